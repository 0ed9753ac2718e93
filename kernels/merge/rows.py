"""Tell rows of a history by what they hold, bit for bit, in one number each."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_marks(k: Tensor, v: Tensor) -> Tensor:
    """Give each row of keys and values `[B, H, L, D]` a number, int64 `[L]`.

    Rows that hold the same have numbers that differ by their order alone, so that no number comes
    twice. That others have the same number is as unlikely as a collision of 64 random bits.
    """
    marks = _sums(k, 0) + _sums(v, 1)
    ordered, order = marks.sort(stable=True)
    first = torch.searchsorted(ordered, ordered)
    again = torch.arange(len(marks), device=k.device) - first
    return marks + torch.empty_like(marks).index_copy_(0, order, again) * 0x2545F4914F6CDD1D


def _sums(x: Tensor, salt: int) -> Tensor:
    """Add the bits of each row as ints, times odd numbers of their own, with what overflows."""
    bits = x.view(_INTS[x.element_size()])
    batch, heads, _, dim = x.shape
    factors = _factors(batch, heads, dim, salt, x.device)
    return torch.stack(
        [(bits[b, h].long() * factors[b, h]).sum(1) for b in range(batch) for h in range(heads)]
    ).sum(0)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _factors(batch: int, heads: int, dim: int, salt: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(salt)
    size = (batch, heads, dim)
    drawn = torch.randint(-(2**62), 2**62, (math.prod(size),), generator=generator)
    return (drawn * 2 + 1).view(size).to(device)
