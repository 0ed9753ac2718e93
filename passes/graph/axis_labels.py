"""Name the axes of what a call takes and gives: those of one name are one index."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import cast

import torch
from torch.fx import Node

# The import registers an operator that is attention.
import lipass.kernels.distinct  # noqa: F401
from lipass.passes.attention.site import SDPA
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import value

Labels = tuple[Sequence[tuple[Node, Sequence[Hashable]]], Sequence[Hashable]]
"""Operands, each axis with a name, and the names of the result's axes; the others are summed."""


def from_right(node: Node) -> list[Hashable]:
    """Name the axes of a tensor by their distance from the last, as broadcasting counts."""
    rank = value(node).dim()
    return list(range(-rank, 0))


def of_product(node: Node, name: str) -> Labels | None:
    """Name the axes of a product of two tensors."""
    if name == "einsum":
        return _of_einsum(node)
    if name not in ("matmul", "bmm", "mm") or len(node.args) != 2:
        return None
    left, right = node.args
    if not all(isinstance(x, Node) and value(x).dim() >= 2 for x in (left, right)):
        return None
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    batch = from_right(node)[:-2]

    def named(x: Node, last: list[str]) -> list[Hashable]:
        return [*batch[len(batch) - (value(x).dim() - 2) :], *last]

    return [(left, named(left, ["m", "k"])), (right, named(right, ["k", "n"]))], [*batch, "m", "n"]


def _of_einsum(node: Node) -> Labels | None:
    equation, *given = node.args
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = [*given[0]]
    if not isinstance(equation, str) or equation.count("->") != 1:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    names = inputs.split(",")
    if len(names) != len(given) or any(
        len(set(x) - {"."}) < len(x.replace(".", "")) for x in names
    ):
        return None
    operands: list[tuple[Node, Sequence[Hashable]]] = []
    most = 0
    for x, letters in zip(given, names, strict=True):
        if not isinstance(x, Node):
            return None
        rest = value(x).dim() - len(letters.replace("...", ""))
        operands.append((x, _with_rest(letters, rest)))
        most = max(most, rest)
    return operands, _with_rest(out, most)


def _with_rest(letters: str, rest: int) -> list[Hashable]:
    """Name the axes that three dots stand for by their distance from the last of them."""
    front, dots, back = letters.partition("...")
    return [*front, *(range(-rest, 0) if dots else ()), *back]


def of_attention(node: Node) -> Labels | None:
    """Name the axes of attention in which no order of keys or queries is told."""
    if is_call(node, SDPA):
        given = dict(zip(_SDPA_ARGUMENTS, node.args, strict=False)) | node.kwargs
        if given.get("attn_mask") is not None or given.get("is_causal") or given.get("dropout_p"):
            return None
        q, k, v = (cast(Node, given[key]) for key in _SDPA_ARGUMENTS[:3])
    elif node.target is torch.ops.lipass.attend_distinct.default:
        q, k, v = (cast(Node, x) for x in node.args[:3])
    else:
        return None
    outer = from_right(node)[:-2]
    named = [(q, [*outer, "q", "d"]), (k, [*outer, "k", "d"]), (v, [*outer, "k", "e"])]
    if any(value(x).dim() != len(outer) + 2 for x, _ in named) or len({q, k, v}) < 3:
        return None
    return named, [*outer, "q", "e"]


_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
