"""Prove that a mask with a row for each query is one row for all queries that matter."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lipass.passes.graph.compat import Size, known_true, value
from lipass.passes.graph.ops import (
    argument,
    is_cast,
    is_copy,
    is_expansion,
    is_reshape,
    moved_axes,
    name_of,
)
from lipass.passes.graph.writes import is_rewritten

_ANDS = ("and", "bitwise_and", "logical_and", "mul")
_ONES = ("ones", "new_ones", "ones_like")


def same_for_all(mask: Node) -> bool:
    """Whether a mask is one row `[.., 1, Lk]` that is repeated for every query."""
    return _repeated(_plain(mask)) is not None


def same_for(mask: Node, tokens: Size, *, first: bool) -> bool:
    """Whether the rows of so many tokens, the first or the last ones, are equal.

    ::

        %seen = pad(%mask, (latents, 0), value=True)
        %row = %seen.view(B, 1, 1, L).repeat(1, 1, L, 1)
        %mask = %row & %row.transpose(2, 3)

    Rows of tokens that are never hidden are those of the keys that are not.
    """
    plain = _plain(mask)
    if _repeated(plain) is not None:
        return True
    if name_of(plain) not in _ANDS or is_rewritten(plain):
        return False
    sides = [one for one in plain.args if isinstance(one, Node)]
    if len(sides) != 2:
        return False
    for across, down in (sides, reversed(sides)):
        row, column = _repeated(_plain(across)), _repeated(_turned(_plain(down)))
        if row is not None and column is not None:
            return _is_shown(column, tokens, first=first)
    return False


def _plain(node: Node) -> Node:
    """Walk up to what a node is a copy of, and stay at a copy that is written to."""
    while (is_cast(node) or is_copy(node)) and not is_rewritten(node):
        node = node.all_input_nodes[0]
    return node


def _repeated(node: Node | None) -> Node | None:
    """Return the row `[.., 1, Lk]` of which a node is copies along its axis -2.

    What is written to an expanded row is seen by all queries alike; repeated rows are memory of
    their own.
    """
    if node is None or not (is_expansion(node) or name_of(node) == "repeat"):
        return None
    if is_rewritten(node):
        return None
    row = node.all_input_nodes[0]
    above, below = value(row).shape, value(node).shape
    if len(above) < 2 or len(above) != len(below) or not known_true(above[-2] == 1):
        return None
    return row if known_true(above[-1] == below[-1]) else None


def _turned(node: Node) -> Node | None:
    """Return what a node is the transpose of, along its last two axes."""
    moved = moved_axes(node)
    rank = value(node).dim()
    if moved is None or moved[-2:] != (rank - 1, rank - 2) or is_rewritten(node):
        return None
    return _plain(node.all_input_nodes[0])


def _is_shown(row: Node, tokens: Size, *, first: bool) -> bool:
    """Whether a row is true for so many of its first or last keys, whatever else it is made of."""
    while (is_cast(row) or is_copy(row) or is_reshape(row)) and not is_rewritten(row):
        row = row.all_input_nodes[0]
    if is_rewritten(row):
        return False
    if name_of(row) == "pad":
        added, shown = argument(row, 1, "pad"), argument(row, 3, "value")
        if not isinstance(added, (tuple, list)) or len(added) < 2 or shown in (None, 0, False):
            return False
        return known_true(value(added[0 if first else 1]) == tokens)
    if name_of(row) != "cat":
        return False
    pieces: Any = argument(row, 0, "tensors")
    piece = _plain(pieces[0 if first else -1])
    length = value(piece).shape[-1]
    shown = name_of(piece) in _ONES and not is_rewritten(piece)
    return shown and known_true(length == tokens)


def rows(mask: Node) -> Size:
    """Return how many rows of queries a mask has; one where it is a row for all."""
    tensor = value(mask)
    assert isinstance(tensor, torch.Tensor)
    return tensor.shape[-2]
