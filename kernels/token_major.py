"""Lay outputs out token by token, as models read them next: transposing and joining heads is free.

Dense attention does the same on CPUs and GPUs, so what follows it expects no other order.
"""

from __future__ import annotations

from torch import Tensor


def token_major(x: Tensor) -> Tensor:
    """Return `[B, H, L, D]` that lies in memory as `[B, L, H, D]`; copies only where needed."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_token_major(like: Tensor) -> Tensor:
    """Allocate `[B, H, L, D]` that lies in memory as `[B, L, H, D]`."""
    batch, heads, tokens, dim = like.shape
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)
