"""Infer the latent grid of a token sequence from the reshape that made the tokens."""

from __future__ import annotations

import torch
from torch.fx import Node

from lipass.passes.compat import Size, known_true, value
from lipass.passes.match import Refusal, upstream
from lipass.passes.site import Grid

_MERGES = {"reshape", "flatten"}


def infer(tokens_of: Node, tokens: Size) -> Grid | Refusal:
    """Find `(T, Y, X)` with `T * Y * X == tokens`, proven for all sizes of the graph.

    Walks up, nearest first and without crossing an attention, to a reshape that merges three
    neighbouring axes `(T, Y, X)` into the tokens, at once (`[B, C, T, Y, X] -> [B, C, L]`) or
    in two steps (`(Y, X)` first). The order of the axes is the order of the tokens.

    Args:
        tokens_of: a tensor made from the tokens, such as q.
        tokens: its number of tokens.
    """
    pairs: list[tuple[Size, Size]] = []
    for node in upstream(tokens_of):
        if node.op != "call_method" or node.target not in _MERGES:
            continue
        above, below = value(node.args[0]).shape, value(node).shape
        if sum(known_true(size == tokens) for size in below) > 1:
            continue  # features or batch may be what was merged
        for i in _merged(above, below, 3):
            if known_true(above[i] * above[i + 1] * above[i + 2] == tokens) and len(above) >= 5:
                return above[i], above[i + 1], above[i + 2]
        for i in _merged(above, below, 2):
            if known_true(above[i] * above[i + 1] == tokens):
                pairs.append((above[i], above[i + 1]))
            for latents, per_latent in pairs:
                whole = known_true(above[i] * above[i + 1] == per_latent)
                if whole and i > 0 and known_true(above[i - 1] == latents):
                    return latents, above[i], above[i + 1]
    return Refusal("no reshape from [.., T, Y, X, ..] to its tokens is upstream of q")


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
