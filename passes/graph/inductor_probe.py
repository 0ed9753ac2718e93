"""Ask the Inductor of this process whether it still computes a small program wrongly."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree

from lipass.passes.graph.compat import undisturbed

Program = Callable[..., Any]


@functools.cache
def goes_wrong(program: Program, *shapes: tuple[int, ...]) -> bool:
    """Whether the graph passes of Inductor change what a program computes, or fail at it.

    The program is run as they leave it, without code generation, so this takes a fraction of a
    second; it is asked once a process. What cannot be tried counts as wrong: the workaround stays.

    Args:
        program: a function of tensors that torch.fx can trace.
        shapes: of its arguments; what it writes to them is compared as well.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    with (
        undisturbed(),
        torch._guards.tracing(None),
        torch.no_grad(),
        # what torch deprecates is no verdict, where warnings are errors
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        given = [torch.randn(shape, generator=generator) for shape in shapes]
        mine = [one.clone() for one in given]
        expected = [*_tensors(program(*given)), *given]
        try:
            found = [*_tensors(_compiled(program, mine)(*mine)), *mine]
        except Exception:
            return True
        pairs = zip(expected, found, strict=True)
        return not all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [one for one in pytree.tree_leaves(outputs) if isinstance(one, torch.Tensor)]


def _compiled(program: Program, inputs: list[torch.Tensor]) -> Program:
    import torch._functorch.config
    from torch._inductor import compile_fx

    functorch: Any = torch._functorch.config
    gm = torch.fx.symbolic_trace(program)
    output = gm.graph.output_node()
    if not isinstance(output.args[0], tuple):
        output.args = ((output.args[0],),)
        gm.recompile()
    with functorch.patch(enable_autograd_cache=False):
        run: Any = compile_fx.compile_fx(gm, list(inputs), inner_compile=passes_only)
    compiled: Program = run
    return compiled


def passes_only(gm: torch.fx.GraphModule, example_inputs: list[Any], **_: Any) -> Any:
    """Run Inductor's passes, and then the graph as they left it; no code is generated."""
    from torch._inductor import compile_fx
    from torch._inductor.virtualized import V

    with V.set_fake_mode(torch._guards.detect_fake_mode(example_inputs)):
        compile_fx._recursive_post_grad_passes(gm, is_inference=True)

    def run(args: list[Any]) -> Any:
        return torch.fx.Interpreter(gm).run(*args)

    boxed: Any = run
    boxed._boxed_call = True
    return boxed
