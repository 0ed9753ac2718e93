"""Turn queries and keys into a block plan: pool, select, mask."""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout
from lipass.kernels.pool.api import pool_blocks
from lipass.kernels.select.api import select_blocks


def plan_attention(
    q: Tensor,
    keys: list[Tensor],
    layout: KvLayout,
    q_grid: BlockGrid,
    *,
    budget: float,
    scale: float,
    role: str,
    sink_latents: int,
    keep_frames: Tensor | None = None,
) -> BlockPlan:
    """Choose what each query block visits; arguments as in `select_blocks`.

    Args:
        q: queries `[B, H, Lq, D]`.
        keys: one tensor `[B, H, L, D]` per segment of the layout.
        layout: the key segments.
        q_grid: grid of the queries.
        budget: share of the unprotected candidate blocks to visit, in `(0, 1]`.
        scale: softmax scale.
        role: `"prefill"` or `"decode"`.
        sink_latents: how many of the first candidate frames are always visited.
        keep_frames: `[B, T]` bool over the candidate frames, or None to keep all.
    """
    candidate = layout.candidate_segment(role)
    q_mean = pool_blocks(q, q_grid)
    if candidate is None:
        k_mean = q_mean[:, :, :0]
    else:
        k_mean = pool_blocks(keys[candidate], layout.segments[candidate].grid)
    indices, counts = select_blocks(
        q_mean,
        k_mean,
        layout,
        q_grid,
        budget=budget,
        scale=scale,
        role=role,
        sink_latents=sink_latents,
        keep_frames=keep_frames,
    )
    key_keep = None
    if keep_frames is not None and candidate is not None:
        key_keep = _key_keep(layout, candidate, keep_frames)
    shared = tuple(n for n in range(len(layout.segments)) if n != candidate)
    return BlockPlan(
        indices,
        counts,
        q_grid,
        layout,
        key_keep=key_keep,
        uniform=keep_frames is None,
        shared_segments=shared,
    )


def _key_keep(layout: KvLayout, candidate: int, keep_frames: Tensor) -> Tensor:
    """Mask tokens of dropped frames in tiles that hold a kept frame, `[B, Lk]` bool.

    A tile without a kept frame stays open: nobody visits it but, in prefill, its own queries.
    """
    grid, span = layout.segments[candidate].grid, layout.token_range(candidate)
    frame = keep_frames.repeat_interleave(grid.grid[1] * grid.grid[2], 1)
    dropped_tile = ~grid.blocks_with(keep_frames)[:, grid.block_of_token(keep_frames.device)]
    keep = torch.ones(
        keep_frames.shape[0], layout.tokens, dtype=torch.bool, device=keep_frames.device
    )
    keep[:, span.start : span.stop] = frame | dropped_tile
    return keep
