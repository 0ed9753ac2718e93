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
    neighbouring axes `(T, Y, X)` into the tokens, at once (`[B, C, T, Y, X] -> [B, C, L]`) or in two
    steps (`(Y, X)` first). The order of the axes is the order of the tokens.

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
        for axes in _merged(above, below, 3):
            if known_true(axes[0] * axes[1] * axes[2] == tokens) and len(above) >= 5:
                return axes[0], axes[1], axes[2]
        for axes in _merged(above, below, 2):
            if known_true(axes[0] * axes[1] == tokens):
                pairs.append((axes[0], axes[1]))
            for latents, per_latent in pairs:
                if known_true(axes[0] * axes[1] == per_latent) and _before(above, axes, latents):
                    return latents, axes[0], axes[1]
    return Refusal("no reshape from [.., T, Y, X, ..] to its tokens is upstream of q")


def _merged(above: torch.Size, below: torch.Size, count: int) -> list[tuple[Size, ...]]:
    """List the runs of `count` axes of `above` that are one axis of `below`, all others equal."""
    if len(above) - len(below) != count - 1:
        return []
    runs = []
    for i in range(len(below)):
        left = all(known_true(a == b) for a, b in zip(above[:i], below[:i], strict=True))
        right = zip(above[i + count :], below[i + 1 :], strict=True)
        if left and all(known_true(a == b) for a, b in right):
            runs.append(tuple(above[i : i + count]))
    return runs


def _before(shape: torch.Size, axes: tuple[Size, ...], latents: Size) -> bool:
    """Whether the axis in front of `axes` counts the latents."""
    for i in range(1, len(shape) - 1):
        if shape[i : i + 2] == axes and known_true(shape[i - 1] == latents):
            return True
    return False
