"""Run a graph that holds a whole denoising loop: its steps behind guards, compiled once."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch._guards import detect_fake_mode
from torch.fx.passes.split_module import split_module

from lipass import session
from lipass.passes.site import region_name

Compiled = Callable[..., Any]

# Sampler arithmetic between steps: a handful of pointwise calls on the latents of one chunk.
# Compiling each piece costs seconds and saves microseconds.
_GLUE_CALLS = 16


class StepLoop:
    """Hold what the guards of one loop share while it runs; separate for each thread."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._local = threading.local()

    def begin(self) -> None:
        """Ask the session which steps of the chunk that is open are reused."""
        chunk = session.current_chunk()
        self._local.reused = () if chunk is None else chunk.step_plan(self.steps).reused
        self._local.chunk = chunk

    def run(self, index: int, compiled: Compiled, args: tuple[Any, ...]) -> Any:
        """Compute a step, or return the outputs of the last computed one."""
        if index == 0:
            self.begin()
        elif index in self._local.reused:
            self._local.chunk.lookups += 1
            return self._local.outputs
        self._local.outputs = outputs = compiled(*args)
        if index == self.steps - 1:
            self._local.outputs = None
        return outputs


def compile_steps(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    inner_compile: Callable[[torch.fx.GraphModule, list[Any]], Compiled],
) -> Compiled:
    """Cut a graph at its outlined steps and compile the pieces, all steps as one."""
    part: dict[torch.fx.Node, int] = {}
    current = 0
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        call = node.args[0] if node.target is operator.getitem else None
        if isinstance(call, torch.fx.Node) and region_name(call):
            part[node] = part[call]
            continue
        is_step = region_name(node) is not None
        current += is_step
        part[node] = current
        current += is_step
    pieces = split_module(gm, torch.nn.Module(), part.__getitem__, keep_original_order=True)
    inputs = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode(inputs)
    with mode:
        fakes = [
            _fake(given, shaped) for given, shaped in zip(example_inputs, inputs, strict=True)
        ]
        _PieceCompiler(pieces, inner_compile).run(*fakes)
    compiled: Compiled = pieces.forward
    return compiled


def _fake(given: Any, shaped: Any) -> Any:
    """Return an input for the inner compiler: fake in the mode that is current, sizes symbolic.

    Dynamo's fake tensors are in the mode it traced in, and the example inputs have no symbols.
    """
    if not isinstance(shaped, torch.Tensor):
        return shaped
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


class _PieceCompiler(torch.fx.Interpreter):
    """Walk over the pieces with fake inputs and replace each by its compiled form."""

    def __init__(
        self, pieces: torch.fx.GraphModule, inner_compile: Callable[..., Compiled]
    ) -> None:
        super().__init__(pieces)
        self.inner_compile = inner_compile
        self.loop = StepLoop(sum(_step_call(piece) is not None for piece in pieces.children()))
        self.body: Compiled | None = None
        self.steps = 0

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compile one piece for the inputs that reach it."""
        piece = self.fetch_attr(target)
        outputs = super().call_module(target, args, kwargs)
        compiled: Compiled
        calls = sum(node.op.startswith("call") for node in piece.graph.nodes)
        if (step := _step_call(piece)) is not None:
            compiled = self._guarded(piece, step, args)
        elif calls > _GLUE_CALLS:
            compiled = _compile_piece(piece, args, self.inner_compile)
        else:
            return outputs
        # An entry of __dict__ is found before the submodule of the same name.
        self.module.__dict__[target] = compiled
        return outputs

    def _guarded(
        self, piece: torch.fx.GraphModule, step: torch.fx.Node, args: tuple[Any, ...]
    ) -> Compiled:
        """Return a piece that is one step: reorders its inputs for the body, picks its outputs."""
        names = [node.name for node in piece.graph.find_nodes(op="placeholder")]
        order = [names.index(node.name) for node in step.args]
        results = piece.graph.output_node().args[0]
        single = isinstance(results, torch.fx.Node)
        picks = [node.args[1] for node in ((results,) if single else results)]
        if self.body is None:
            module = piece.get_submodule(str(step.target))
            self.body = self.inner_compile(module, [args[i] for i in order])
        loop, body, index = self.loop, self.body, self.steps
        self.steps += 1

        def guarded(*given: Any) -> Any:
            outputs = loop.run(index, body, tuple(given[i] for i in order))
            return outputs[picks[0]] if single else tuple(outputs[i] for i in picks)

        return guarded


def _step_call(piece: torch.nn.Module) -> torch.fx.Node | None:
    """Return the call of the step that a piece consists of, or None."""
    nodes = piece.graph.nodes if isinstance(piece, torch.fx.GraphModule) else ()
    return next((node for node in nodes if region_name(node)), None)


def _compile_piece(
    piece: torch.fx.GraphModule, args: tuple[Any, ...], inner_compile: Callable[..., Compiled]
) -> Compiled:
    """Compile a piece, which returns a tuple for the inner compiler and a bare value here."""
    output = piece.graph.output_node()
    if isinstance(output.args[0], (tuple, list)):
        return inner_compile(piece, list(args))
    output.args = ((output.args[0],),)
    piece.recompile()
    compiled = inner_compile(piece, list(args))
    return lambda *given: compiled(*given)[0]
