"""Touch the private parts of torch that passes need in one place, by feature, not by version."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any, NoReturn

import torch
import torch._higher_order_ops.invoke_subgraph
import torch._inductor.config as inductor_config
import torch.fx
import torch.nn.attention
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import is_from_unspecialized_nn_module_source
from torch._dynamo.symbolic_convert import TensorifyState
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = int | torch.SymInt

# What Dynamo writes at both ends of `with sdpa_kernel(..)`; it has no public name.
choose_kernel: Callable[..., Any] | None = getattr(torch.nn.attention, "_sdpa_kernel", None)

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
    """Make a condition that holds now a guard of the graph, so that it holds whenever it runs.

    What the user has declared (`mark_dynamic`) goes first: see `why_no_guard`.
    """
    return holds_now(condition) and not why_no_guard(condition) and bool(condition)


def why_no_guard(condition: bool | torch.SymBool) -> str:
    """Say which declared sizes a guard would exclude, for which torch raises, or nothing."""
    if not isinstance(condition, torch.SymBool) or known_true(condition):
        return ""
    expr: Any = condition.node.expr
    for size, constraint in _declared(condition.node.shape_env):
        if expr.free_symbols != {size.node.expr}:
            continue  # torch ties declared sizes to each other without complaint
        if (declared := getattr(constraint, "vr", None)) is not None:
            span = f"{declared.lower} to {declared.upper}"
            return f"mark_dynamic declares sizes from {span}, and it does not hold for all of them"
        # a size marked as dynamic may be tied to multiples, but not to one number
        several = expr.xreplace({size.node.expr: size.node.hint * _MANY})
        if not constraint.warn_only and not bool(several):
            return "mark_dynamic declares that the size varies, and it holds for one size only"
    return ""


_MANY = 1009
"""A prime, so that a size that many times larger divides by no more than the size itself."""


def _declared(env: Any) -> Iterator[tuple[torch.SymInt, Any]]:
    """Iterate over the sizes that users have declared, with what torch keeps about each."""
    for tracked in env.tracked_fakes or ():
        context = tracked.symbolic_context
        known = getattr(context, "constraint_sizes", None)
        known = [getattr(context, "constraint", None)] if known is None else known
        for size, constraint in zip(sizes_of(tracked.fake), known, strict=False):
            if constraint is not None and is_symbolic(size):
                assert isinstance(size, torch.SymInt)
                yield size, constraint


def has_hint(size: Size) -> bool:
    """Whether a size is known in the call that is being compiled; sizes made of data are not."""
    return not isinstance(size, torch.SymInt) or bool(size.node.has_hint())


def hint(size: Size) -> int:
    """Return a size as it is in the call that is being compiled; adds no guard."""
    return int(size.node.hint if isinstance(size, torch.SymInt) else size)


def divides(part: Size, whole: Size) -> bool | torch.SymBool:
    """Return the condition that `whole` is a multiple of `part`."""
    size: Any = whole
    remainder: bool | torch.SymBool = size % part == 0
    return remainder


def is_symbolic(size: Size) -> bool:
    """Whether a size may differ between calls of the graph."""
    return isinstance(size, torch.SymInt) and size.node.expr.free_symbols != set()


def constant(number: Size | float | torch.SymFloat) -> Size | float | torch.SymFloat:
    """Return the plain number behind a symbolic one that is the same in all calls.

    A symbol that a guard has tied to one number is a `SymInt` still, in whose expression there is
    none left: heads and features of a cache whose length varies, say.
    """
    if not isinstance(number, (torch.SymInt, torch.SymFloat)) or number.node.expr.free_symbols:
        return number
    kind = int if isinstance(number, torch.SymInt) else float
    return kind(number.node.expr)


def sizes_of(given: object) -> tuple[Size, ...]:
    """Return the sizes that an input shows: a shape, or itself if it is a size."""
    if isinstance(given, torch.Tensor):
        return tuple(given.shape)
    return (given,) if isinstance(given, (int, torch.SymInt)) else ()


def symbols_of(size: Size) -> set[str]:
    """Return the names of the symbols in a size."""
    return {str(one) for one in size.node.expr.free_symbols} if is_symbolic(size) else set()


def float_symbols(number: torch.SymFloat) -> set[str]:
    """Return the names of the Python floats that a number is computed from."""
    return {str(one) for one in number.node._expr.free_symbols}


def start_again_with_constants(symbols: set[str]) -> NoReturn:
    """Have Dynamo trace the function again with these Python floats as constants, under guards.

    Raises:
        TensorifyScalarRestartAnalysis: always; only to be called by a backend.
    """
    for name in symbols:
        TensorifyState.specialize(name)
    raise TensorifyScalarRestartAnalysis


def can_isolate() -> bool:
    """Whether `torch.compile` can be told that calls of it on one function count apart."""
    return "isolate_recompiles" in inspect.signature(torch.compile).parameters


def backends_of(code: CodeType) -> list[Any]:
    """Return the backends that one function is compiled for, each once."""
    entries: Any = getattr(torch._dynamo.eval_frame, "_debug_get_cache_entry_list", None)
    of_code = [] if entries is None else entries(code)
    found = {id(one.backend): one.backend for one in of_code if hasattr(one, "backend")}
    return list(found.values())


def can_skip_stages() -> bool:
    """Whether Inductor can be told to leave a stage out, and the user's shell says nothing."""
    if not hasattr(inductor_config, "disabled_passes"):
        return False
    with inductor_config.patch(disabled_passes="none"):
        return bool(inductor_config.disabled_passes == "none")


@contextlib.contextmanager
def stages_skipped(stages: Iterable[str]) -> Iterator[None]:
    """Compile with Inductor without these of its stages; nothing outside is changed."""
    config: Any = inductor_config
    names = ",".join(filter(None, (config.disabled_passes, *sorted(stages))))
    with config.patch(disabled_passes=names):
        yield


def is_parameter(placeholder: torch.fx.Node) -> bool:
    """Whether a placeholder is a parameter, buffer or other attribute of a module."""
    if isinstance(value(placeholder), torch.nn.Parameter):
        return True
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    return source is not None and is_from_unspecialized_nn_module_source(source)


@contextlib.contextmanager
def unguarded(mode: FakeTensorMode) -> Iterator[None]:
    """Run fake tensors without adding guards; sizes that are symbols go where Dynamo's do."""
    env = mode.shape_env
    with enable_python_dispatcher(), env.suppress_guards() if env else contextlib.nullcontext():
        yield


def device_of(func: object, args: tuple[Any, ...]) -> torch.device | None:
    """Answer what device a fake tensor is on, which no mode can pass on; None for the rest."""
    if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
        return args[0].fake_device
    return None


def decomposed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run what an operator is composed of, in inference mode too; NotImplemented if of nothing."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    composed = isinstance(func, torch._ops.OpOverload) and func.has_kernel_for_dispatch_key(key)
    return func.decompose(*args, **kwargs) if composed else NotImplemented


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Compute with real tensors in the middle of a compilation, whatever modes are on.

    Tensors are made in fp32 where no dtype is given, whatever the default of the process is.
    """
    default = torch.get_default_dtype()
    with (
        unset_fake_temporarily(),
        torch._C.DisableTorchFunction(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


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
