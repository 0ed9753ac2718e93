"""Compute rotary tables in the graph, from where tokens start, whatever the length in front."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_tables(
    dims: Sequence[int],
    start: int,
    sizes: Sequence[int],
    theta: float,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines `[T * Y * X, D]` of latents that start at frame `start`.

    Tables that are made for all of a sequence and cut to the tokens of a call have the length of
    the sequence in their graph, which is then compiled anew for each; these are of the call's own
    tokens, and `start` is a number that is added.

    Args:
        dims: how much of `D` turns with each axis `(T, Y, X)`; pairs of neighbours turn alike.
        start: position of the first frame.
        sizes: `(T, Y, X)` of the call.
        theta: base of the frequencies.
        device: where the tables are needed.
    """
    angles = []
    for axis, (dim, size) in enumerate(zip(dims, sizes, strict=True)):
        places = torch.arange(size, device=device) + (start if axis == 0 else 0)
        exponents = torch.arange(0, dim, 2, device=device)[: dim // 2].float() / dim
        own = torch.outer(places.float(), 1.0 / theta**exponents)
        shape = [1, 1, 1, own.shape[1]]
        shape[axis] = size
        angles.append(own.view(shape).expand(*sizes, -1).flatten(0, 2))
    cosine = torch.cat([one.cos().repeat_interleave(2, dim=1) for one in angles], dim=1)
    sine = torch.cat([one.sin().repeat_interleave(2, dim=1) for one in angles], dim=1)
    return cosine, sine
