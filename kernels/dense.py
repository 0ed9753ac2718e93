"""Attend to all keys of one piece or several: joined for SDPA, or read where they lie.

Models join text, history and current keys in front of each attention call. The compiled
block-sparse kernel reads segments where they lie, so with a plan that visits every block it is
dense attention without the copies.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels.block_sparse import native
from lipass.kernels.plan import ROLES, BlockGrid, BlockPlan, KvLayout, Segment
from lipass.kernels.token_major import token_major

PIECES_MAX = len(ROLES)
# As many keys as the compiled kernel takes at once (`kKeys`).
_BLOCK_TOKENS = 128


def attend_joined(q: Tensor, k: list[Tensor], v: list[Tensor], scale: float) -> Tensor:
    """Join keys and values `[B, H, L, D]` and call SDPA; the output is token-major."""
    key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in (k, v))
    return token_major(F.scaled_dot_product_attention(q, key, value, scale=scale))


def attend_apart(q: Tensor, k: list[Tensor], v: list[Tensor], scale: float) -> Tensor:
    """Read keys and values where they lie, with the compiled kernel; the output is token-major.

    Takes what `why_not_apart` does not refuse.
    """
    plan = plan_of_all(*q.shape[:3], tuple([part.shape[2] for part in k]))
    out, _ = native.block_sparse_attention(q, k, v, plan, scale=scale, key_bias=None)
    return out


def why_not_apart(device: torch.device, dtype: torch.dtype, tokens: tuple[int, ...]) -> str | None:
    """Say why no kernel reads pieces of so many tokens where they lie, or return None."""
    if device.type != "cpu":
        return f"keys in pieces are read on a CPU only, got {device.type}"
    if dtype not in native.DTYPES:
        return f"keys in pieces are read in fp32, bf16 and fp16, got {dtype}"
    if not 1 <= len(tokens) <= PIECES_MAX:
        return f"its keys must be 1 to {PIECES_MAX} pieces, got {len(tokens)}"
    if min(tokens) == 0:
        return "one of its pieces is empty"
    return native.why_not_loaded()


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def plan_of_all(batch: int, heads: int, queries: int, tokens: tuple[int, ...]) -> BlockPlan:
    """Visit every block of pieces of so many tokens; the roles only number them."""
    tile = (1, 1, _BLOCK_TOKENS)
    layout = KvLayout(
        tuple(
            Segment(role, BlockGrid((1, 1, length), tile))
            for role, length in zip(ROLES, tokens, strict=False)
        )
    )
    q_grid = BlockGrid((1, 1, queries), tile)
    blocks = torch.arange(layout.blocks, dtype=torch.int32)
    indices = blocks.expand(batch, heads, q_grid.blocks, -1).contiguous()
    counts = torch.full(indices.shape[:-1], layout.blocks, dtype=torch.int32)
    segments = tuple(range(len(tokens)))
    return BlockPlan(indices, counts, q_grid, layout, uniform=True, shared_segments=segments)
