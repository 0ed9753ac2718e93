"""Recognise rows that are repeated, and say how a call on them looks on the rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.writes import mutates

# fmt: off
_POINTWISE = {
    "abs", "bfloat16", "clone", "contiguous", "cos", "detach", "double", "elu", "exp", "float",
    "gelu", "half", "hardswish", "leaky_relu", "log", "mish", "neg", "relu", "rsqrt", "sigmoid",
    "silu", "sin", "softplus", "sqrt", "square", "tanh", "to", "type",
}
# fmt: on
_BINARY = {"add", "sub", "mul", "div", "truediv", "pow", "maximum", "minimum"}
_PARTS = {"chunk", "split", "tensor_split", "unbind"}


@dataclass(frozen=True)
class Repeat:
    """A node whose rows along `dim` each come `times` times, one behind another."""

    rows: Node
    """The rows, `times` times fewer along the axis; of another shape where `flat` is set."""
    dim: int
    times: int
    flat: tuple[int, int] | None = None
    """Axes of `rows` to flatten first: the row axis and those of size 1 that were expanded."""


@dataclass(frozen=True)
class Moved:
    """A call on the rows in place of the repeated rows."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dim: int
    """Axis of the result that is repeated."""


def repeat_of(node: Node) -> Repeat | None:
    """Match `repeat_interleave` by a number, and `expand` with a reshape that joins the copies."""
    if _name(node) == "repeat_interleave":
        return _interleaved(node)
    if _name(node) in ("reshape", "flatten") and node.op == "call_method":
        return _expanded(node)
    return None


def _interleaved(node: Node) -> Repeat | None:
    given = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | node.kwargs
    rows, times, dim = (given.get(name) for name in ("input", "repeats", "dim"))
    if not (isinstance(rows, Node) and isinstance(times, int) and isinstance(dim, int)):
        return None
    return Repeat(rows, dim % value(rows).dim(), times)


def _expanded(node: Node) -> Repeat | None:
    wide = node.args[0]
    if not isinstance(wide, Node) or wide.op != "call_method" or wide.target != "expand":
        return None
    narrow = wide.args[0]
    if not isinstance(narrow, Node) or value(narrow).dim() != value(wide).dim():
        return None
    before, after, out = value(narrow).shape, value(wide).shape, value(node).shape
    axes = [n for n, size in enumerate(before) if not known_true(size == after[n])]
    if not axes or axes != list(range(axes[0], axes[-1] + 1)) or axes[0] == 0:
        return None
    copies = [after[n] for n in axes]
    if not all(isinstance(size, int) for size in copies):
        return None
    dim, end, times = axes[0] - 1, axes[-1], math.prod(copies)
    joined = (*after[:dim], after[dim] * times, *after[end + 1 :])
    if len(joined) != len(out) or not all(map(known_true, map(_equal, joined, out))):
        return None
    return Repeat(narrow, dim, times, (dim, end))


def moved(node: Node, dims: Mapping[Node, int]) -> Moved | None:
    """Say how a call looks on rows, or return None if it needs the repeated ones.

    Args:
        node: the call.
        dims: repeated nodes, with the axis that is repeated.
    """
    if mutates(node) or not node.args:
        return None
    name, first = _name(node), node.args[0]
    if name in _BINARY:
        return _moved_binary(node, dims)
    if name == "cat":
        return _moved_cat(node, dims)
    if not isinstance(first, Node) or first not in dims:
        return None
    if any(other in dims for other in node.all_input_nodes if other is not first):
        return None
    dim = dims[first]
    if name in _POINTWISE:
        return _as_it_is(node, dim)
    if name == "linear":
        return _as_it_is(node, dim) if dim != value(first).dim() - 1 else None
    if name in ("layer_norm", "rms_norm"):
        shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
        across = len(shape) if isinstance(shape, (list, tuple)) else value(first).dim()
        return _as_it_is(node, dim) if dim < value(first).dim() - across else None
    if name in _PARTS:
        return _moved_parts(node, dim)
    if name == "getitem":
        return _moved_index(node, dim)
    if name in ("unflatten", "flatten", "reshape", "unsqueeze"):
        return _moved_view(node, name, dim)
    return None


def _as_it_is(node: Node, dim: int) -> Moved:
    return Moved(node.args, dict(node.kwargs), dim)


def _moved_binary(node: Node, dims: Mapping[Node, int]) -> Moved | None:
    """Both operands are rows, or one does not reach the repeated axis."""
    if any(isinstance(named, Node) for named in node.kwargs.values()):
        return None
    rank, from_right = value(node).dim(), set()
    for operand in node.args[:2]:
        if not isinstance(operand, Node):
            continue
        tensor = value(operand)
        if operand in dims:
            if tensor.dim() != rank:
                return None
            from_right.add(dims[operand] - rank)
    if len(from_right) != 1:
        return None
    (at,) = from_right
    for operand in node.args[:2]:
        if not isinstance(operand, Node) or operand in dims:
            continue
        tensor = value(operand)
        reaches = isinstance(tensor, torch.Tensor) and tensor.dim() >= -at
        if reaches and not known_true(tensor.shape[at] == 1):
            return None
    return _as_it_is(node, rank + at)


def _moved_cat(node: Node, dims: Mapping[Node, int]) -> Moved | None:
    """All pieces are rows, joined along another axis."""
    pieces = node.args[0]
    if not isinstance(pieces, (list, tuple)):
        return None
    found = {dims.get(piece) if isinstance(piece, Node) else None for piece in pieces}
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if len(found) != 1 or not isinstance(axis, int):
        return None
    (dim,) = found
    if dim is None or axis % value(node).dim() == dim:
        return None
    return _as_it_is(node, dim)


def _moved_parts(node: Node, dim: int) -> Moved | None:
    first = node.args[0]
    axis = node.args[-1] if _name(node) == "unbind" and len(node.args) > 1 else None
    if _name(node) != "unbind" and len(node.args) > 2:
        axis = node.args[2]
    axis = node.kwargs.get("dim", 0 if axis is None else axis)
    if not isinstance(axis, int) or axis % value(first).dim() == dim:
        return None
    if not all(_name(user) == "getitem" and isinstance(user.args[1], int) for user in node.users):
        return None
    gone = _name(node) == "unbind" and axis % value(first).dim() < dim
    return _as_it_is(node, dim - gone)


def _moved_index(node: Node, dim: int) -> Moved | None:
    index = node.args[1]
    if isinstance(value(node.args[0]), (tuple, list)):
        return _as_it_is(node, dim)
    items = index if isinstance(index, tuple) else (index,)
    rank = value(node.args[0]).dim()
    if Ellipsis in items:
        at = items.index(Ellipsis)
        missing = rank - sum(item is not None for item in items) + 1
        items = (*items[:at], *[slice(None)] * missing, *items[at + 1 :])
    axis, result = 0, 0
    for item in items:
        if item is None:
            result += 1
            continue
        if not isinstance(item, (slice, int)):
            return None
        if axis == dim:
            return _as_it_is(node, result) if item == slice(None) else None
        axis += 1
        result += isinstance(item, slice)
    return _as_it_is(node, result + dim - axis)


def _moved_view(node: Node, name: str, dim: int) -> Moved | None:
    """Views that leave everything up to the repeated axis as it is, or put an axis beside it."""
    first = node.args[0]
    before, after = value(first).shape, value(node).shape
    if name == "unsqueeze":
        axis = node.args[1]
        if not isinstance(axis, int):
            return None
        return _as_it_is(node, dim + (axis % (len(before) + 1) <= dim))
    if name == "unflatten" and not (
        isinstance(axis := node.args[1], int) and axis % len(before) > dim
    ):
        return None
    if len(after) <= dim or not all(map(known_true, map(_equal, before, after[: dim + 1]))):
        return None
    if name != "reshape":
        return _as_it_is(node, dim)
    sizes = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    rest = list(sizes[dim + 1 :])
    if -1 in (*sizes[:dim], *rest):
        return None
    return Moved((first, *sizes[:dim], -1, *rest), dict(node.kwargs), dim)


def _equal(a: Any, b: Any) -> Any:
    return a == b


def _name(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return ""  # another library's operator may mean anything by a name
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
