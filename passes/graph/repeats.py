"""Recognise rows that are repeated, and say how a call on them looks on the rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.ops import (
    argument,
    is_expansion,
    is_norm_of_rows,
    is_pointwise,
    is_reshape,
    is_view,
    name_of,
)
from lipass.passes.graph.writes import mutates


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
    if name_of(node) == "repeat_interleave":
        return _interleaved(node)
    return _expanded(node) if is_reshape(node) else None


def _interleaved(node: Node) -> Repeat | None:
    given = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | node.kwargs
    rows, times, dim = (given.get(name) for name in ("input", "repeats", "dim"))
    if not (isinstance(rows, Node) and isinstance(times, int) and isinstance(dim, int)):
        return None
    return Repeat(rows, dim % value(rows).dim(), times)


def _expanded(node: Node) -> Repeat | None:
    wide = node.all_input_nodes[0]
    if not is_expansion(wide):
        return None
    narrow = wide.all_input_nodes[0]
    if value(narrow).dim() != value(wide).dim():
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
    if not node.args or mutates(node):
        return None
    name, first = name_of(node), node.args[0]
    if is_pointwise(node):
        return _moved_pointwise(node, dims)
    if name == "cat":
        return _moved_cat(node, dims)
    if not isinstance(first, Node) or first not in dims:
        return None
    if any(other in dims for other in node.all_input_nodes if other is not first):
        return None
    dim = dims[first]
    if name == "linear":
        return _as_it_is(node, dim) if dim != value(first).dim() - 1 else None
    if is_norm_of_rows(node):
        shape = argument(node, 1, "normalized_shape")
        across = len(shape) if isinstance(shape, (list, tuple)) else value(first).dim()
        return _as_it_is(node, dim) if dim < value(first).dim() - across else None
    if name == "getitem":
        return _moved_index(node, dim)
    if is_view(node) and isinstance(value(node), (tuple, list)):
        return _moved_parts(node, name, dim)
    return _moved_view(node, name, dim) if is_reshape(node) else None


def _as_it_is(node: Node, dim: int) -> Moved:
    return Moved(node.args, dict(node.kwargs), dim)


def _moved_pointwise(node: Node, dims: Mapping[Node, int]) -> Moved | None:
    """Each operand is rows, or does not reach the repeated axis."""
    if any(isinstance(named, Node) for named in node.kwargs.values()):
        return None
    operands = [x for x in node.all_input_nodes if isinstance(value(x), torch.Tensor)]
    rank = value(node).dim()
    from_right = {dims[x] - rank for x in operands if x in dims}
    if len(from_right) != 1 or any(value(x).dim() != rank for x in operands if x in dims):
        return None
    (at,) = from_right
    for operand in operands:
        tensor = value(operand)
        if operand not in dims and tensor.dim() >= -at and not known_true(tensor.shape[at] == 1):
            return None
    return _as_it_is(node, rank + at)


def _moved_cat(node: Node, dims: Mapping[Node, int]) -> Moved | None:
    """All pieces are rows, joined along another axis."""
    pieces = node.args[0]
    if not isinstance(pieces, (list, tuple)):
        return None
    found = {dims.get(piece) if isinstance(piece, Node) else None for piece in pieces}
    axis = argument(node, 1, "dim", 0)
    if len(found) != 1 or not isinstance(axis, int):
        return None
    (dim,) = found
    if dim is None or axis % value(node).dim() == dim:
        return None
    return _as_it_is(node, dim)


def _moved_parts(node: Node, name: str, dim: int) -> Moved | None:
    """The parts of a tensor along another axis."""
    first = node.args[0]
    axis = argument(node, 1 if name == "unbind" else 2, "dim", 0)
    if not isinstance(axis, int) or axis % value(first).dim() == dim:
        return None
    if not all(
        name_of(user) == "getitem" and isinstance(user.args[1], int) for user in node.users
    ):
        return None
    gone = name == "unbind" and axis % value(first).dim() < dim
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
    """Views that leave everything up to the repeated axis as it is, or put an axis beside it.

    Or that join it with axes in front, such as the batch: copies still come one behind another.
    """
    first = node.args[0]
    before, after = value(first).shape, value(node).shape
    if name in ("reshape", "flatten") and (at := _joined_at(before, after, dim)) is not None:
        return _as_it_is(node, at) if name == "flatten" else _reshaped(node, at)
    if name == "unsqueeze":
        axis = argument(node, 1, "dim")
        if not isinstance(axis, int):
            return None
        return _as_it_is(node, dim + (axis % (len(before) + 1) <= dim))
    if name == "unflatten" and not (
        isinstance(axis := argument(node, 1, "dim"), int) and axis % len(before) > dim
    ):
        return None
    if len(after) <= dim or not all(map(known_true, map(_equal, before, after[: dim + 1]))):
        return None
    if name in ("unflatten", "flatten"):
        return _as_it_is(node, dim)
    return _reshaped(node, dim) if name == "reshape" else None


def _joined_at(before: torch.Size, after: torch.Size, dim: int) -> int | None:
    """Return the axis that the repeated one and some in front of it became, all else equal."""
    gone = len(before) - len(after)
    at = dim - gone
    if gone < 1 or at < 0:
        return None
    joined = (*before[:at], math.prod(before[at : dim + 1]), *before[dim + 1 :])
    return at if all(map(known_true, map(_equal, joined, after))) else None


def _reshaped(node: Node, dim: int) -> Moved | None:
    """A reshape whose axis `dim` is the repeated one: as long as the rows are."""
    first = node.args[0]
    sizes = argument(node, 1, "shape", ())
    sizes = sizes if isinstance(sizes, (list, tuple)) else node.args[1:]
    rest = list(sizes[dim + 1 :])
    if -1 in (*sizes[:dim], *rest) or not all(isinstance(x, (int, Node)) for x in sizes):
        return None
    moved_sizes = (*sizes[:dim], -1, *rest)
    spread = moved_sizes if node.op == "call_method" else (moved_sizes,)
    return Moved((first, *spread), {}, dim)


def _equal(a: Any, b: Any) -> Any:
    return a == b
