"""Tell rows of latents from rows of text in attention whose queries hold both.

Text is what is joined with the latents, whatever it is: a prompt, an image, a coarse context. It
attends, and is attended to, in full.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from lipass.passes.attention import match, padding_mask
from lipass.passes.attention.match import Operands, Refusal
from lipass.passes.attention.site import SDPA, AttentionSite, Grid, KeySegment
from lipass.passes.attention.token_grid import Merge, merge
from lipass.passes.attention.walk import shares_tokens, upstream
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import Size, hint, is_symbolic, known_true, value
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.ops import name_of


@dataclass(frozen=True)
class Joint:
    """Say which tokens of a tensor are latents; the rest, in front or behind, is text."""

    latents_first: bool
    latents: Node
    grid: Grid
    rest: Size
    """How many tokens are text."""
    merge: Merge | None
    """What shows the grid; None where the options give it."""

    @property
    def tokens(self) -> Size:
        """How many are latents."""
        t, y, x = self.grid
        return t * y * x

    def same(self, other: Joint) -> bool:
        """Whether two tensors hold the same latents at the same place."""
        shown = self.merge is None or other.merge is None
        if self.merge is not None and other.merge is not None:
            shown = self.merge.same_order(other.merge)
        sizes = zip(self.grid, other.grid, strict=True)
        return (
            self.latents_first == other.latents_first
            and shown
            and all(known_true(a == b) for a, b in sizes)
            and shares_tokens(self.latents, other.latents, self.tokens)
        )


def whole(call: Node) -> Operands | Refusal:
    """Match a call whose keys are to be cut as its queries are, not as they were joined."""
    return match.attention(call, masked=True, in_pieces=False, by_rows=True)


def joined_as_q(call: Node) -> Operands | None:
    """Match a call whose keys are joined of parts that are all made from the tokens of q.

    Positions are often put in before memory and new latents are joined, in k and not in v.
    """
    found = whole(call)
    if isinstance(found, Refusal):
        return None
    tokens, (key,), (val,) = value(found.q).shape[2], found.keys, found.values
    parts = match.joined(key)
    if len(parts) == len(match.joined(val)) == 1:
        return None
    if not known_true(value(key).shape[2] == tokens):
        return None
    return found if all(shares_tokens(found.q, one, tokens) for one in parts) else None


def find(tensor: Node, tokens: Size, given: tuple[int, ...] | None = None) -> Joint | Refusal:
    """Find the nearest concatenation of text and a latent grid that a tensor is made from.

    Args:
        tensor: queries or keys.
        tokens: how many they are.
        given: the grid of the latents, `(T, Y, X)` or `(Y, X)`, where the graph does not show it.
    """
    for node in upstream(tensor):
        if name_of(node) != "cat" or not isinstance(value(node), torch.Tensor):
            continue
        sizes = value(node).shape
        axes = [axis for axis, size in enumerate(sizes) if known_true(size == tokens)]
        if len(axes) != 1:
            continue
        pieces = _pieces(node, axes[0])
        lengths = [value(piece).shape[axes[0]] for piece in pieces]
        if len(pieces) < 2 or not known_true(sum(lengths) == tokens):
            continue  # joined along another axis
        grids = [
            merge(piece, size) if given is None else _given(size, given)
            for piece, size in zip(pieces, lengths, strict=True)
        ]
        at = [i for i, grid in enumerate(grids) if not isinstance(grid, Refusal)]
        if given is not None and len(at) > 1:
            continue  # all are frames of one grid, or nothing tells which
        # a context that is joined with them, at a coarser grid say, is shorter
        own = max(at, key=lambda i: hint(lengths[i]), default=-1)
        if own not in (0, len(pieces) - 1):
            continue
        found = grids[own]
        assert not isinstance(found, Refusal)
        rest = sum(size for i, size in enumerate(lengths) if i != own)
        if is_symbolic(lengths[own]) and is_symbolic(rest):
            return Refusal("both latents and text, which its queries hold, vary between calls")
        shown = found if isinstance(found, Merge) else None
        grid = found.grid if isinstance(found, Merge) else found
        return Joint(own == 0, pieces[own], grid, rest, shown)
    return Refusal("no concatenation of text and latents is upstream of q")


def _given(tokens: Size, given: tuple[int, ...]) -> Grid | Refusal:
    """Return the grid of a piece that is whole latents of a given one."""
    *latents, y, x = given
    grid = (latents[0] if latents else tokens // (y * x), y, x)
    if known_true(grid[0] * y * x == tokens) and known_true(tokens != 0):
        return grid
    return Refusal(f"token_grid {given} does not give its {tokens} tokens")


def _pieces(node: Node, axis: int) -> list[Node]:
    """List what concatenations along one axis are made of, in order."""
    pieces = node.args[0] if name_of(node) == "cat" and node.args else None
    if not isinstance(pieces, (list, tuple)) or not all(isinstance(x, Node) for x in pieces):
        return [node]
    sizes = [value(piece).shape[axis] for piece in pieces]
    if not known_true(sum(sizes) == value(node).shape[axis]):
        return [node]
    return [one for piece in pieces for one in _pieces(piece, axis)]


def describe(
    operands: Operands, given: tuple[int, ...] | None = None
) -> tuple[Grid, tuple[KeySegment, ...], bool] | Refusal:
    """Give the grid of the latents, the segments of the keys and whether latents come first."""
    tokens: Size = value(operands.q).shape[2]
    (key,) = operands.keys
    if not known_true(value(key).shape[2] == tokens):
        return Refusal("its keys are not the tokens of its queries")
    mine, theirs = (find(one, tokens, given) for one in (operands.q, key))
    for found in (mine, theirs):
        if isinstance(found, Refusal):
            return found
    assert isinstance(mine, Joint)
    assert isinstance(theirs, Joint)
    if not mine.same(theirs):
        return Refusal("text and latents are joined in another order in k than in q")
    mask = operands.mask
    if mask is not None and not known_true(padding_mask.rows(mask) == 1):
        first = mine.latents_first
        if not padding_mask.same_for(mask, mine.tokens, first=first):
            return Refusal("its mask may differ between latents")
    grid = mine.grid
    text = KeySegment("text", mine.rest, (1, 1, mine.rest), "joined with the latents in q too")
    own = KeySegment("current", mine.tokens, grid, "made from the tokens of q")
    return grid, (text, own), mine.latents_first


@dataclass(frozen=True)
class Cut:
    """Hold the rows of latents of a call, and its rows of text, attended to in full."""

    latents: Operands
    text_rows: Node
    latents_first: bool

    def joined(self, made: Node, emit: Emitter) -> Node:
        """Join the result of the latents with that of the text, in their order."""
        rows = [made, self.text_rows] if self.latents_first else [self.text_rows, made]
        return emit(torch.cat, rows, 2)


def cut(call: Node, operands: Operands, site: AttentionSite, emit: Emitter) -> Cut:
    """Cut a call into rows of latents and rows of text, which keep dense attention.

    ::

        %o = scaled_dot_product_attention(%q, %k, %v)

        %text = scaled_dot_product_attention(%q[:, :, :text], %k, %v)
        %latents = ..(%q[:, :, text:], [%k[:, :, :text], %k[:, :, text:]], ..)
        %o = cat([%text, %latents], 2)
    """
    first, (text, latents) = bool(site.latents_first), (one.tokens for one in site.segments)
    (k,), (v,) = operands.keys, operands.values
    # of two lengths one is a number; slices count it from its end
    ahead, behind = (latents, text) if first else (text, latents)
    middle = -int(behind) if is_symbolic(ahead) else int(ahead)
    own, rest = slice(None, middle), slice(middle, None)
    if not first:
        own, rest = rest, own

    def rows(tensor: Node, part: slice) -> Node:
        return emit(operator.getitem, tensor, (slice(None), slice(None), part))

    def scores(mask: Node, part: slice) -> Node:
        return emit(operator.getitem, mask, (Ellipsis, part))

    mask, given = operands.mask, dict(call.kwargs)
    if mask is not None and not known_true(padding_mask.rows(mask) == 1):
        # rows of text keep their own; those of latents are equal
        given["attn_mask"] = rows(mask, rest)
        mask = rows(mask, slice(0, 1) if first else slice(-1, None))
    if mask is not None:
        mask = emit(torch.cat, [scores(mask, rest), scores(mask, own)], -1)
    cut_of = replace(
        operands,
        q=rows(operands.q, own),
        keys=(rows(k, rest), rows(k, own)),
        values=(rows(v, rest), rows(v, own)),
        mask=mask,
    )
    assert is_call(call, SDPA)
    return Cut(cut_of, emit(SDPA, rows(operands.q, rest), k, v, **given), first)
