"""Follow an axis of tokens through views: where it is in the shape behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.fx import Node

from lipass.passes.attention.site import Grid
from lipass.passes.graph.compat import Size, known_true, value
from lipass.passes.graph.ops import argument


class Axes(NamedTuple):
    """Say which axis of a shape holds tokens."""

    grid: Grid
    axis: int
    whole: bool | None
    """Whether of all latents, or of each; None where they are cut into a grid."""


def reshaped(
    before: Sequence[Size], after: Sequence[Size], tokens: Axes, in_latents: bool
) -> Axes | None:
    """Return where tokens are behind a reshape, or None if it mixes them with other axes.

    Args:
        before: the shape in front of it.
        after: the shape behind it.
        tokens: where they are in front of it.
        in_latents: whether tokens of a latent stay together, so that latents may be cut apart and
            joined again.
    """
    (t, y, x), axis, whole = tokens
    front: Any = math.prod(before[:axis])
    for at in range(len(after)):
        above = math.prod(after[:at])
        if known_true(above == front):
            if _starts(after, at, (t * y * x if whole else y * x,)):
                return tokens._replace(axis=at)
            if _starts(after, at, (t, y, x) if whole else (y, x)):
                return tokens._replace(axis=at, whole=None)
        if whole and known_true(above == front * t):
            if in_latents and _starts(after, at, (y * x,)):
                return tokens._replace(axis=at, whole=False)
            if _starts(after, at, (y, x)):
                return tokens._replace(axis=at, whole=None)
        if not whole and known_true(above * t == front) and _starts(after, at, (t * y * x,)):
            return tokens._replace(axis=at, whole=True)
    return None


def _starts(shape: Sequence[Size], at: int, sizes: Sequence[Size]) -> bool:
    found = shape[at : at + len(sizes)]
    return len(found) == len(sizes) and all(
        known_true(a == b) for a, b in zip(found, sizes, strict=True)
    )


def indexed(node: Node, axis: int) -> int | None:
    """Return where an axis is behind `x[..]`, if the index leaves it whole."""
    index: Any = node.args[1]
    items = index if isinstance(index, tuple) else (index,)
    rank = value(node.args[0]).dim()
    if sum(item is Ellipsis for item in items) == 1:
        at = next(n for n, item in enumerate(items) if item is Ellipsis)
        missing = rank - sum(item is not None for item in items) + 1
        items = (*items[:at], *[slice(None)] * missing, *items[at + 1 :])
    above, below = 0, 0
    for item in items:
        if item is None:
            below += 1
            continue
        if not isinstance(item, (slice, int)) or isinstance(item, bool):
            return None
        if above == axis:
            return below if item == slice(None) else None
        above += 1
        below += isinstance(item, slice)
    return below + axis - above


def parts(node: Node, name: str, axis: int) -> int | None:
    """Return where an axis is in parts of a tensor along another one."""
    place = {"unbind": 1, "select": 1, "narrow": 1, "index_select": 1}.get(name)
    if name in ("chunk", "split", "tensor_split", "split_with_sizes"):
        place = 2
    if place is None:
        return None
    dim = argument(node, place, "dim", 0)
    if not isinstance(dim, int) or (dim := dim % value(node.args[0]).dim()) == axis:
        return None
    return axis - (name in ("unbind", "select") and dim < axis)
