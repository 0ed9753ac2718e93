"""Touch the private parts of torch that passes need in one place, by feature, not by version."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._higher_order_ops.invoke_subgraph
import torch.fx
from torch._dynamo.source import is_from_unspecialized_nn_module_source
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = int | torch.SymInt

invoke_subgraph = torch.ops.higher_order.invoke_subgraph


def value(node: object) -> Any:
    """Return the fake value of a node, or the object itself if it is no node."""
    return node.meta.get("example_value") if isinstance(node, torch.fx.Node) else node


def without_vmap(tensor: object) -> object:
    """Return the tensor in which `torch.vmap` holds another one, as in masks of FlexAttention."""
    while isinstance(tensor, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(
        tensor
    ):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def fake_mode_of(graph: torch.fx.Graph) -> FakeTensorMode:
    """Return the mode in which Dynamo computed the fake values of a graph."""
    for node in graph.nodes:
        if isinstance(value(node), FakeTensor):
            mode: FakeTensorMode = value(node).fake_mode
            return mode
    return FakeTensorMode()


def known_true(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for all their values, given the guards so far."""
    return bool(statically_known_true(condition))


def holds_now(condition: bool | torch.SymBool) -> bool:
    """Whether a condition holds for the sizes that are being compiled; adds no guard."""
    if not isinstance(condition, torch.SymBool):
        return bool(condition)
    return condition.node.has_hint() and bool(condition.node.hint)


def guard(condition: bool | torch.SymBool) -> bool:
    """Make a condition that holds now a guard of the graph, so that it holds whenever it runs."""
    return holds_now(condition) and bool(condition)


def hint(size: Size) -> int:
    """Return a size as it is in the call that is being compiled; adds no guard."""
    return int(size.node.hint if isinstance(size, torch.SymInt) else size)


def real_tensors() -> contextlib.AbstractContextManager[object]:
    """Run code that measures, which fake tensors would make meaningless."""
    return unset_fake_temporarily()


def divides(part: Size, whole: Size) -> bool | torch.SymBool:
    """Return the condition that `whole` is a multiple of `part`."""
    size: Any = whole
    remainder: bool | torch.SymBool = size % part == 0
    return remainder


def is_symbolic(size: Size) -> bool:
    """Whether a size may differ between calls of the graph."""
    return isinstance(size, torch.SymInt) and size.node.expr.free_symbols != set()


def sizes_of(given: object) -> tuple[Size, ...]:
    """Return the sizes that an input shows: a shape, or itself if it is a size."""
    if isinstance(given, torch.Tensor):
        return tuple(given.shape)
    return (given,) if isinstance(given, (int, torch.SymInt)) else ()


def symbols_of(size: Size) -> set[str]:
    """Return the names of the symbols in a size."""
    return {str(one) for one in size.node.expr.free_symbols} if is_symbolic(size) else set()


def is_parameter(placeholder: torch.fx.Node) -> bool:
    """Whether a placeholder is a parameter, buffer or other attribute of a module."""
    if isinstance(value(placeholder), torch.nn.Parameter):
        return True
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    return source is not None and is_from_unspecialized_nn_module_source(source)


def real_input(placeholder: torch.fx.Node) -> object:
    """Return what Dynamo was called with for a placeholder, or None where it does not say."""
    held = getattr(placeholder.meta.get("grapharg"), "_example", None)
    return held() if callable(held) and not isinstance(held, torch.Tensor) else held


def compiled_frame() -> tuple[str, torch.nn.Module | None]:
    """Return the name of the function that is being compiled, and the model that it is part of.

    The model is its `self`, or the one module among its arguments.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        root = InstructionTranslator.current_tx().output
        name, local = str(root.root_tx.f_code.co_name), dict(root.local_scope)
    except (ImportError, AttributeError):
        return "", None
    mine = local.get("self")
    if isinstance(mine, torch.nn.Module):
        return name, mine
    modules = [one for one in local.values() if isinstance(one, torch.nn.Module)]
    return name, modules[0] if len(modules) == 1 else None


def unguarded(mode: FakeTensorMode) -> contextlib.AbstractContextManager[object]:
    """Run fake tensors without adding guards."""
    return mode.shape_env.suppress_guards() if mode.shape_env else contextlib.nullcontext()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Compute with real tensors in the middle of a compilation, whatever modes are on."""
    with (
        unset_fake_temporarily(),
        torch._C.DisableTorchFunction(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Add a text to the structured trace (tlparse), if one is being written."""
    try:
        from torch._logging._internal import trace_structured
    except ImportError:
        return
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=payload,
        expect_trace_id=False,
    )
