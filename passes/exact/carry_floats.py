"""Keep Python floats that vary values of the graph: none is stale, none is compiled anew."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.compat import float_symbols, value
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.names import module_path

_FULL = (torch.full, "new_full")
_TENSOR = (torch._refs.tensor, torch.tensor, torch.as_tensor, torch.scalar_tensor)
_CLAMP = ("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_")
_VALUE = ("fill_", "masked_fill", "masked_fill_", "where", "setitem", *_CLAMP)
_ALPHA = ("add", "add_", "sub", "sub_")
_ARITHMETIC = ("mul", "add", "sub", "div", "truediv", "gt", "lt", "ge", "le", "eq", "ne")
# torch makes these of arithmetic, so a float in them stays a value too.
_CARRIED = {"rsub", "arange", "linspace", "leaky_relu", "elu", "softplus", "hardshrink"}
_CARRIED |= {form.format(name) for name in _ARITHMETIC for form in ("{}", "{}_", "i{}")}
_PLAIN = {"dtype", "device", "size", "fill_value", "data", "s"}


@dataclass(frozen=True)
class CarryFloats(Pass):
    """Write calls on a varying float so that the float reaches them as a tensor.

    ::

        %t = torch.full((4,), %sigma)

        %ones = torch.ones((4,), dtype=f32)
        %t = %ones * %sigma

    torch makes tensors of floats that are multiplied or added, and constants of all others: then
    each value is compiled anew, up to torch's limit, behind which the function runs uncompiled.
    Where one float is used in both ways, torch 2.13 writes its first value into the graph that it
    keeps for all (pytorch#194976).

    Keeps: integers and complex numbers. A float that is used in another call as well becomes a
    constant by torch's own means, with a note: right, but compiled anew for each value.
    """

    name: ClassVar[str] = "carry-floats"
    numerics: ClassVar[Numerics] = Numerics.REORDERED
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)
    precedes: ClassVar[tuple[str, ...]] = ("hoist-calls", "share-blocks")

    inner: str = "inductor"
    """The inner compiler; `eager` takes floats as they are."""

    @classmethod
    def options_from(cls, options: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        return {"inner": options["inner"]} if "inner" in options else {}

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        changed = False
        for node in ctx.visit([node for node in graph.nodes if floats_of(node)]):
            if _rewrite(node, Emitter(node, ctx)):
                ctx.note(_place(node), "rewritten", "a Python float stays a value of the graph")
                changed = True
        if self.inner == "inductor":
            self._make_constants(graph, ctx)
        return changed

    def _make_constants(self, graph: Graph, ctx: PassContext) -> None:
        """Ask for constants in place of floats that torch would carry in some calls only."""
        carried: set[str] = set()
        stuck: dict[Node, set[str]] = {}
        for node in graph.nodes:
            symbols = {name for one in floats_of(node) for name in float_symbols(value(one))}
            if not symbols or not isinstance(value(node), torch.Tensor):
                continue
            if _name(node) in _CARRIED:
                carried |= symbols
            else:
                stuck[node] = symbols
        for node, symbols in stuck.items():
            if mixed := symbols & carried:
                ctx.constant_floats |= mixed
                ctx.note(
                    _place(node),
                    "kept",
                    f"{_name(node)} takes a Python float that other calls take as a tensor, which "
                    "torch 2.13 confuses (pytorch#194976); it is a constant, compiled anew for "
                    "each value: pass a tensor",
                )


def floats_of(node: Node) -> list[Node]:
    """List the inputs of a call that are Python floats which vary."""
    if node.op not in ("call_function", "call_method"):
        return []
    return [one for one in node.all_input_nodes if isinstance(value(one), torch.SymFloat)]


def _rewrite(node: Node, emit: Emitter) -> bool:
    name = _name(node)
    for names, rewrite in _REWRITES:
        if name in names or node.target in names:
            return rewrite(node, emit)
    return False


def _full(node: Node, emit: Emitter) -> bool:
    """Rewrite `full(size, s)` and `x.new_full(size, s)`."""
    given = node.args[1:] if node.op == "call_method" else node.args
    named = dict(zip(("size", "fill_value"), given, strict=False)) | dict(node.kwargs)
    return set(named) <= _PLAIN and _replace(
        node, _spread(emit, torch.ones, named["size"], named["fill_value"], value(node))
    )


def _full_like(node: Node, emit: Emitter) -> bool:
    named = dict(zip(("input", "fill_value"), node.args, strict=False)) | dict(node.kwargs)
    return set(named) <= {"input", *_PLAIN} and _replace(
        node, _spread(emit, torch.ones_like, named["input"], named["fill_value"], value(node))
    )


def _tensor(node: Node, emit: Emitter) -> bool:
    """Rewrite `tensor(s)` and `tensor([s, 1.0, s * 2])`."""
    if not node.args or not set(node.kwargs) <= _PLAIN:
        return False
    data: Any = node.args[0]
    if isinstance(data, Node):
        return _replace(node, _spread(emit, torch.ones, (), data, value(node)))
    if not all(isinstance(item, (int, float)) or _is_float(item) for item in data):
        return False
    items = [_scalar(emit, item, value(node)) for item in data]
    return all(items) and _replace(node, emit(torch.stack, items))


def _value(node: Node, emit: Emitter) -> bool:
    """Give a call that takes tensors of one element its floats as such."""
    out = value(node.args[0]) if _name(node) != "where" else value(node)
    if not out.dtype.is_floating_point:
        return False
    first = 2 if _name(node) == "setitem" else 1
    if _name(node) in _CLAMP:
        # its two bounds are both numbers or both tensors
        bounds = [*node.args[1:], *node.kwargs.values()]
        if not all(b is None or isinstance(b, (int, float)) or _is_float(b) for b in bounds):
            return False
        node.args = (node.args[0], *(_scalar(emit, b, out) for b in node.args[1:]))
        node.kwargs = {key: _scalar(emit, b, out) for key, b in node.kwargs.items()}
        return True
    args = [_scalar(emit, arg, out) if _is_float(arg) else arg for arg in node.args[first:]]
    kwargs = {k: _scalar(emit, v, out) if _is_float(v) else v for k, v in node.kwargs.items()}
    done = (*node.args[:first], *args) != node.args or kwargs != node.kwargs
    node.args, node.kwargs = (*node.args[:first], *args), kwargs
    return done


def _alpha(node: Node, emit: Emitter) -> bool:
    """Rewrite `add(x, y, alpha=s)` as `add(x, y * s)`, which is what Inductor computes."""
    factor = node.kwargs.get("alpha")
    if not _is_float(factor) or len(node.args) != 2:
        return False
    x, y = map(value, node.args)
    if not all(isinstance(t, torch.Tensor) and t.dtype.is_floating_point for t in (x, y)):
        return False
    scaled = emit(operator.mul, node.args[1], factor)
    node.args = (node.args[0], scaled)
    node.kwargs = {key: one for key, one in node.kwargs.items() if key != "alpha"}
    return True


_REWRITES: tuple[tuple[tuple[Any, ...], Callable[[Node, Emitter], bool]], ...] = (
    (_FULL, _full),
    ((torch.full_like,), _full_like),
    (_TENSOR, _tensor),
    (_VALUE, _value),
    (_ALPHA, _alpha),
)


def _spread(emit: Emitter, ones: Any, size: Any, number: Any, out: torch.Tensor) -> Node | None:
    """Return `ones(size) * number` in the dtype of `out`; one times a float is that float."""
    if out.dtype.is_complex or (out.dtype.is_floating_point and out.dtype.itemsize == 1):
        return None
    wide = out.dtype if out.dtype.is_floating_point else torch.float64
    made = emit(operator.mul, emit(ones, size, dtype=wide, device=out.device), number)
    return made if wide == out.dtype else emit.method("to", made, out.dtype)


def _scalar(emit: Emitter, number: Any, out: torch.Tensor) -> Any:
    """Return a number as a tensor of one element in the dtype of `out`; None stays None."""
    if number is None:
        return None
    if _is_float(number):
        return _spread(emit, torch.ones, (), number, out)
    return emit(torch.full, (), number, dtype=out.dtype, device=out.device)


def _replace(node: Node, made: Node | None) -> bool:
    if made is None:
        return False
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return True


def _is_float(one: object) -> bool:
    return isinstance(one, Node) and isinstance(value(one), torch.SymFloat)


def _name(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _place(node: Node) -> str:
    return module_path(node) or node.name
