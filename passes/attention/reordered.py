"""Tell calls that put tokens in another order, so that places no longer say what is beside."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lipass.passes.graph.compat import Size, known_true, value
from lipass.passes.graph.ops import argument, name_of

_AXES: dict[str, tuple[int | None, Any]] = {
    "flip": (1, "dims"),
    "fliplr": (None, 1),
    "flipud": (None, 0),
    "gather": (1, "dim"),
    "index_select": (1, "dim"),
    "roll": (2, "dims"),
    "sort": (1, "dim"),
    "take_along_dim": (2, "dim"),
}
"""Where a call names the axis along which it takes numbers from other places, or the axis."""


def reorders(node: Node, tokens: Size) -> bool:
    """Whether a call takes tokens in another order, or only some of them, by an index.

    Along the last axis it takes features, unless that is the tokens. What has two axes and not as
    many rows is a table.
    """
    source = argument(node, 0, "input")
    if not isinstance(source, Node) or not isinstance(value(source), torch.Tensor):
        return False
    shape = value(source).shape
    rank = len(shape)
    axes = [axis % rank for axis in _axes(node, rank)]
    if rank > 2 and any(axis < rank - 1 for axis in axes):
        return True
    return any(_is_of_tokens(shape, axis, tokens) for axis in axes)


def _axes(node: Node, rank: int) -> list[int]:
    """List the axes along which a call takes numbers from other places."""
    name = name_of(node)
    if name in ("getitem", "index"):
        return _indexed(node, rank)
    if name not in _AXES:
        return []
    place, key = _AXES[name]
    if place is None:
        return [int(key)]
    given = argument(node, place, str(key), -1 if name == "sort" else None)
    if given is None or given == () or given == []:
        return list(range(rank))  # of all numbers in one row
    if name == "flip" and isinstance(given, int):
        given = node.args[place:] or (given,)  # the method takes axes one by one
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _indexed(node: Node, rank: int) -> list[int]:
    """List the axes of a tensor that are read by positions or by a mask."""
    index: Any = argument(node, 1, "indices")
    parts = index if isinstance(index, (tuple, list)) and name_of(node) else (index,)
    if isinstance(index, list) and not any(map(_is_tensor, index)):
        parts = (index,)  # positions
    taken = sum(_width(part) for part in parts)
    found: list[int] = []
    axis = 0
    for part in parts:
        if part is Ellipsis:
            axis += rank - taken
            continue
        if _is_tensor(part) or isinstance(part, list):
            found += range(axis, axis + _width(part))
        axis += _width(part)
    return found


def _width(part: Any) -> int:
    """Return how many axes a part of an index takes."""
    if part is None or part is Ellipsis:
        return 0
    tensor = value(part)
    is_mask = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bool
    return tensor.dim() if is_mask else 1


def _is_tensor(part: Any) -> bool:
    return isinstance(value(part), torch.Tensor)


def _is_of_tokens(shape: torch.Size, axis: int, tokens: Size) -> bool:
    """Whether an axis is that of the tokens, or one of neighbours that are them together."""
    for start in range(max(0, axis - 2), axis + 1):
        product: Size = 1
        for at, size in enumerate(shape[start : start + 3], start):
            product = product * size
            if at >= axis and known_true(product == tokens):
                return True
    return False
