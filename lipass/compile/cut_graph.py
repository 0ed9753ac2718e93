"""Compile a graph in parts: what is guarded or kept between calls runs apart from the rest.

::

    graph     rays | invariant_0 | embed .. | step 0 | x_1 = x + .. | step 1 | x_2 = x_1 + ..
    parts     0      1             2          3        4              5        6
              |      |             |          |        |              |        |
    compiled  yes    kept by the   yes        one      as it is:      the      as it is
                     session                  body     too small      body
                                              guarded  to pay         of 3

Each outlined call is a part of its own, and what stands between two of them is one. All steps
share the body of the first; `GraphLoop` says at run time which of them compute. The parts are the
submodules of what `split_module` makes, and compiled ones take their place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
import torch.fx
from torch.fx.passes.split_module import split_module

from lipass.passes.graph.compat import fake_mode_of, value
from lipass.passes.graph.marks import invariants, region_name
from lipass.runtime.graph_loop import GraphLoop
from lipass.runtime.scope import current

Compiled = Callable[..., Any]
InnerCompile = Callable[[torch.fx.GraphModule, list[Any]], Compiled]

# Sampler arithmetic between steps: a handful of pointwise calls on the latents of one chunk.
# Compiling each part costs seconds and saves microseconds.
_GLUE_CALLS = 16


def outlined(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """List the calls that run apart from the rest of a graph: steps and invariants."""
    steps = [node for node in graph.find_nodes(op="call_module") if region_name(node)]
    return steps + invariants(graph)


def compile_parts(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    inner_compile: InnerCompile,
) -> Compiled:
    """Cut a graph at its outlined steps and invariants, and compile the parts; steps as one."""
    place: dict[torch.fx.Node, int] = {}
    current = 0
    alone = set(outlined(gm.graph))
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        call = node.args[0] if node.target is operator.getitem else None
        if call in alone:
            place[node] = place[call]
            continue
        current += node in alone
        place[node] = current
        current += node in alone
    parts = split_module(gm, torch.nn.Module(), place.__getitem__, keep_original_order=True)
    given = {
        node.name: example
        for node, example in zip(
            gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True
        )
    }
    compiler = _PartCompiler(parts, given, _past_caches(inner_compile))
    with fake_mode_of(gm.graph):
        compiler.compile_all()
    compiled: Compiled = parts.forward
    return compiler.loop.running(compiled) if compiler.loop.steps else compiled


def _past_caches(inner_compile: InnerCompile) -> InnerCompile:
    """Compile anew where torch's caches have a part and cannot check its guards.

    They keep all guards of the graph, those on sizes that the part does not see too.
    """

    def compile_part(part: torch.fx.GraphModule, args: list[Any]) -> Compiled:
        try:
            return inner_compile(part, args)
        except KeyError:
            inductor: Any = torch._inductor.config
            functorch: Any = torch._functorch.config
            with (
                inductor.patch(fx_graph_cache=False),
                functorch.patch(enable_autograd_cache=False),
            ):
                return inner_compile(part, args)

    return compile_part


def _fake(given: Any, shaped: Any) -> Any:
    """Return an input for the inner compiler: fake in the mode that is current, sizes symbolic.

    Dynamo's fake tensors are in the mode it traced in, and the example inputs have no symbols.
    """
    if not isinstance(shaped, torch.Tensor) or shaped.dim() == 0:
        return shaped  # a float that varies comes as a tensor, and only that one knows its symbol
    fake = torch.empty_strided(
        shaped.shape,
        shaped.stride(),
        dtype=shaped.dtype,
        device=shaped.device,
        requires_grad=shaped.requires_grad,
    )
    # how Dynamo marks parameters, which keep their address between calls
    if hasattr(given, "_dynamo_static_input_type"):
        marked: Any = fake
        marked._dynamo_static_input_type = given._dynamo_static_input_type
    return fake


class _PartCompiler:
    """Replace each part by its compiled form, for the inputs that its placeholders describe."""

    def __init__(
        self,
        parts: torch.fx.GraphModule,
        given: dict[str, Any],
        inner_compile: InnerCompile,
    ) -> None:
        self.parts = parts
        self.given = given
        self.inner_compile = inner_compile
        self.names = [str(node.target) for node in parts.graph.find_nodes(op="call_module")]
        calls = [call for name in self.names for call in outlined(self._graph(name))]
        self.loop = GraphLoop(sum(region_name(call) is not None for call in calls))
        self.step: Compiled | None = None
        self.steps = 0

    def compile_all(self) -> None:
        """Compile all parts, in order."""
        for name in self.names:
            part = self.parts.get_submodule(name)
            assert isinstance(part, torch.fx.GraphModule)
            compiled = self._compile(part)
            if compiled is not None:
                # An entry of __dict__ is found before the submodule of the same name.
                self.parts.__dict__[name] = compiled

    def _graph(self, name: str) -> torch.fx.Graph:
        graph = self.parts.get_submodule(name).graph
        assert isinstance(graph, torch.fx.Graph)
        return graph

    def _compile(self, part: torch.fx.GraphModule) -> Compiled | None:
        """Compile a part, or return None where it runs as it is."""
        inputs = part.graph.find_nodes(op="placeholder")
        args = [_fake(self.given.get(node.name), value(node)) for node in inputs]
        call = next(iter(outlined(part.graph)), None)
        if call is not None:
            return self._alone(part, call, args)
        results = [value(node) for node in part.graph.output_node().all_input_nodes]
        computes = any(isinstance(result, torch.Tensor) for result in results)
        if _calls(part) > _GLUE_CALLS or (self.loop.steps == 0 and computes):
            return _compile_part(part, args, self.inner_compile)
        return None

    def _alone(self, part: torch.fx.GraphModule, call: torch.fx.Node, args: list[Any]) -> Compiled:
        """Return a part that is one call: reorders its inputs for the body, picks its outputs."""
        names = [node.name for node in part.graph.find_nodes(op="placeholder")]
        given: Any = call.args
        order = [names.index(node.name) for node in given]
        results: Any = part.graph.output_node().args[0]
        single = isinstance(results, torch.fx.Node)
        picks = [node.args[1] for node in ((results,) if single else results)]
        body = part.get_submodule(str(call.target))
        assert isinstance(body, torch.fx.GraphModule)
        prepare = self._step if region_name(call) else self._invariant
        run = prepare(body, [args[i] for i in order])

        def alone(*given: Any) -> Any:
            outputs = run(*[given[i] for i in order])
            return outputs[picks[0]] if single else tuple(outputs[i] for i in picks)

        return alone

    def _step(self, body: torch.fx.GraphModule, args: list[Any]) -> Compiled:
        """Return one step of the loop behind its guard; all steps share one compiled body."""
        if self.step is None:
            self.step = self.inner_compile(body, args)
        loop, step, index = self.loop, self.step, self.steps
        self.steps += 1
        return lambda *given: loop.step(index, step, given)

    def _invariant(self, body: torch.fx.GraphModule, args: list[Any]) -> Compiled:
        """Return a body whose results the session keeps."""
        small = _calls(body) <= _GLUE_CALLS
        compiled = body.forward if small else self.inner_compile(body, args)

        def run(*given: Any) -> Any:
            now = current()
            return compiled(*given) if now is None else now.invariants.get(compiled, given)

        return run


def _calls(part: torch.fx.GraphModule) -> int:
    return sum(node.op.startswith("call") for node in part.graph.nodes)


def _compile_part(
    part: torch.fx.GraphModule, args: list[Any], inner_compile: InnerCompile
) -> Compiled:
    """Compile a part, which returns a tuple for the inner compiler and a bare value here."""
    output = part.graph.output_node()
    if isinstance(output.args[0], (tuple, list)):
        return inner_compile(part, args)
    output.args = ((output.args[0],),)
    part.recompile()
    compiled = inner_compile(part, args)
    return lambda *given: compiled(*given)[0]
