"""Infer the latent grid of a token sequence from the reshape that made the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from lipass.passes.attention.match import Refusal
from lipass.passes.attention.operators import is_attention
from lipass.passes.attention.products import View
from lipass.passes.attention.reordered import reorders
from lipass.passes.attention.site import Grid
from lipass.passes.attention.walk import upstream
from lipass.passes.graph.collectives import is_collective
from lipass.passes.graph.compat import Size, divides, known_true, value
from lipass.passes.graph.ops import is_reshape, name_of, reads
from lipass.passes.graph.writes import writers_of

NO_RESHAPE = (
    "no reshape from [.., T, Y, X, ..] to its tokens is upstream of q; sparse.token_grid gives "
    "the grid of latents that are packed outside of what is compiled"
)
OVER_TIME = "its tokens are the frames at one place, with no blocks to choose from"
EXCHANGED = (
    "its tokens come from several processes, in an order that no graph shows; sparse.token_grid "
    "gives their grid where it is that of the latents"
)
REORDERED = (
    "its tokens are taken in another order than that of the latents, whose blocks they no longer "
    "are; sparse.token_grid gives the grid in which neighbours lie together"
)


@dataclass(frozen=True)
class Merge:
    """Name the call that merges the axes of a grid into tokens."""

    node: Node
    grid: Grid
    axes: tuple[int, int, int]
    """The axes of its input that are `(T, Y, X)`."""

    def same_order(self, other: Merge) -> bool:
        """Whether both make tokens of one grid in one order, whatever moved the axes before."""
        if self.node is other.node:
            return True
        mine, theirs = (View(m.node.all_input_nodes[0], m.axes).source() for m in (self, other))
        sizes = zip(self.grid, other.grid, strict=True)
        return mine.axes == theirs.axes and all(known_true(a == b) for a, b in sizes)


def infer(tokens_of: Node, tokens: Size) -> Grid | Refusal:
    """Return the grid that `merge` finds, or why there is none."""
    found = merge(tokens_of, tokens)
    return found.grid if isinstance(found, Merge) else found


def other_order(q: Node, key: Node, tokens: Size) -> str:
    """Say that keys are tokens in another order than the queries, or nothing."""
    mine, theirs = merge(q, tokens), merge(key, tokens)
    if isinstance(mine, Refusal) or isinstance(theirs, Refusal):
        return "no reshape shows that it has the grid of q"
    if mine.same_order(theirs):
        return ""
    grids = [f"({', '.join(map(str, x.grid))})" for x in (mine, theirs)]
    return f"q and k are tokens of different grids, {grids[0]} and {grids[1]}"


def merge(tokens_of: Node, tokens: Size) -> Merge | Refusal:
    """Find `(T, Y, X)` with `T * Y * X == tokens`, proven for all sizes of the graph.

    Walks up, nearest first and without crossing an attention, an exchange with other processes or
    a call that takes tokens in another order, to a reshape that merges three neighbouring axes
    `(T, Y, X)` into the tokens, at once (`[B, C, T, Y, X] -> [B, C, L]`) or in two steps
    (`(Y, X)` first, where T may stand apart or in the batch). The order of the axes is the order
    of the tokens. Without a T the grid is `(1, Y, X)`, of frames that attend to themselves alone,
    if a convolution over single frames made them.

    Args:
        tokens_of: a tensor made from the tokens, such as q.
        tokens: its number of tokens.
    """
    pairs: list[tuple[Size, Size]] = []
    frame: Merge | None = None
    narrow: Merge | None = None
    batch, over_time = value(tokens_of).shape[0], False
    exchanged, reordered = False, False
    for node in upstream(tokens_of, lambda one: _hides_order(one, tokens)):
        exchanged |= _is_exchanged(node)
        reordered |= reorders(node, tokens)
        if not (_joins_axes(node) and is_reshape(node)):
            continue
        above, below = value(node.all_input_nodes[0]).shape, value(node).shape
        alike = [i for i, size in enumerate(below) if known_true(size == tokens)]
        if len(alike) > 1 and alike[1:] != [len(below) - 1]:
            continue  # the batch may be what was merged
        for i in _merged(above, below, 3):
            if i in alike[1:]:
                continue  # as many features as tokens, merged from factors of theirs
            places = above[i + 1] * above[i + 2]
            over_time |= known_true(above[i] == tokens) and known_true(divides(places, batch))
            if known_true(above[i] * above[i + 1] * above[i + 2] == tokens) and len(above) >= 5:
                found = Merge(node, (above[i], above[i + 1], above[i + 2]), (i, i + 1, i + 2))
                if not (known_true(above[i + 1] == 1) or known_true(above[i + 2] == 1)):
                    return found
                narrow = narrow or found  # an axis of one is more likely put in for a product
        for i in _merged(above, below, 2):
            if i in alike[1:]:
                continue
            if i == len(above) - 2 and _is_image(node):
                over_time |= known_true(divides(above[i] * above[i + 1], batch))
            for latents, per_latent in pairs:
                if not known_true(above[i] * above[i + 1] == per_latent):
                    continue
                if known_true(above[i] == 1):
                    continue  # an axis of one, such as the batch, is no height
                twice = sum(known_true(size == per_latent) for size in below) > 1
                if twice and not _is_image(node):
                    continue  # heads and features may be what was merged
                grid = (latents, above[i], above[i + 1])
                time = next(
                    (j for j in reversed(range(i)) if known_true(above[j] == latents)), None
                )
                if time is None and i > 1 and known_true(divides(latents, above[0])):
                    time = 0  # [B*T, C, Y, X]
                if time is None:
                    continue
                found = Merge(node, grid, (time, i, i + 1))
                if not (known_true(above[i + 1] == 1) or known_true(latents == 1)):
                    return found
                narrow = narrow or found  # one latent, or an axis that counts something else
            if known_true(above[i] * above[i + 1] == tokens):
                pairs.append((above[i], above[i + 1]))
                if frame is None and i == len(above) - 2 and _is_image(node):
                    frame = Merge(node, (1, above[i], above[i + 1]), (0, i, i + 1))
    found_none = {EXCHANGED: exchanged, REORDERED: reordered, OVER_TIME: over_time}
    why = next((reason for reason, holds in found_none.items() if holds), NO_RESHAPE)
    return narrow or frame or Refusal(why)


def _hides_order(node: Node, tokens: Size) -> bool:
    """Whether the tokens of a node are not those of its inputs, in their order."""
    return is_attention(node) or _is_exchanged(node) or reorders(node, tokens)


def _is_made_like(node: Node) -> bool:
    """Whether a node is new memory of the shape of its input, to be written to."""
    return bool(node.all_input_nodes) and not reads(node)


def _is_exchanged(node: Node) -> bool:
    """Whether a node is what other processes sent, or memory into which it is copied."""
    if not _is_made_like(node):
        return is_collective(node)
    return any(is_collective(one) for copy in writers_of(node) for one in copy.all_input_nodes)


def _is_image(node: Node) -> bool:
    """Whether a reshape is of what a convolution made of single frames, `[B*T, C, Y, X]`."""
    made = View(node.all_input_nodes[0], ()).source().node
    return name_of(made) == "conv2d"


def _joins_axes(node: Node) -> bool:
    """Whether the result of a call has fewer axes than what it is made of."""
    tensors = [value(one) for one in (node, *node.all_input_nodes[:1])]
    if len(tensors) < 2 or not all(isinstance(one, torch.Tensor) for one in tensors):
        return False
    below, above = tensors
    return below.dim() < above.dim()


def _merged(above: torch.Size, below: torch.Size, count: int) -> list[int]:
    """List the axes of `above` from which `count` axes are one of `below`, all others equal."""
    if len(above) - len(below) != count - 1:
        return []
    return [
        i
        for i in range(len(below))
        if _equal(above[:i], below[:i]) and _equal(above[i + count :], below[i + 1 :])
    ]


def _equal(a: torch.Size, b: torch.Size) -> bool:
    # `==` of two shapes would guard on the sizes of this call
    return all(known_true(x == y) for x, y in zip(a, b, strict=True))
