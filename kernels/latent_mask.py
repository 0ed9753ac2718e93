"""Restrict a call to what a mask over latents shows: a causal order of frames, a window, a sink.

Tiles of such calls are of one latent, so that a block is seen or hidden as a whole: the plan is
the mask, and no kernel has to know of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels.plan import BlockGrid, KvLayout, Segment


def unfit_mask(mask: Tensor, batch: int, q_grid: BlockGrid, layout: KvLayout) -> str | None:
    """Say how a mask `[B or 1, Tq, Tk]` does not fit a call, or return None."""
    grids = [q_grid, *(part.grid for part in _latents(layout))]
    tiles = {grid.tile for grid in grids}
    if not all(grid.latents_apart for grid in grids):
        return (
            "latent_mask needs tiles of one latent, which it shows or hides as a whole, got "
            f"{', '.join(map(str, sorted(tiles)))}; use (1, 8, 8) in place of (4, 4, 4)"
        )
    keys = sum(part.grid.grid[0] for part in _latents(layout))
    sizes = (q_grid.grid[0], keys)
    fits = mask.dim() == 3 and mask.shape[0] in (1, batch) and mask.shape[1:] == sizes
    if not fits or mask.dtype != torch.bool:
        return (
            f"latent_mask must be [B or 1, Tq, Tk] bool with B, Tq, Tk = {batch}, {sizes[0]}, "
            f"{sizes[1]}, got {list(mask.shape)} {mask.dtype}; give each latent of the queries a "
            "row over the latents of history and current keys"
        )
    return None


def seen_blocks(mask: Tensor, q_grid: BlockGrid, layout: KvLayout) -> Tensor:
    """Say which key blocks a query block may visit, `[B or 1, Nq, Nk]` bool; text always.

    Args:
        mask: `[B or 1, Tq, Tk]` bool.
        q_grid: grid of the queries, its tile of one latent.
        layout: the key segments, those of latents with tiles of one.
    """
    rows = mask.repeat_interleave(_per_latent(q_grid.blocks, q_grid), 1)
    return _columns(rows, layout, [part.grid.blocks for part in layout.segments])


def seen_keys(mask: Tensor, q_grid: BlockGrid, layout: KvLayout) -> Tensor:
    """Say which keys a query sees, `[B or 1, 1, Lq, Lk]` bool; arguments as in `seen_blocks`."""
    rows = mask.repeat_interleave(_per_latent(q_grid.tokens, q_grid), 1)
    return _columns(rows, layout, [part.grid.tokens for part in layout.segments])[:, None]


def seen_from(mask: Tensor, latent: int, layout: KvLayout) -> Tensor:
    """Say which keys are seen from one latent of the queries, `[B or 1, 1, 1, Lk]` bool."""
    rows = mask[:, latent : latent + 1]
    return _columns(rows, layout, [part.grid.tokens for part in layout.segments])[:, None]


def seen_from_blocks(mask: Tensor, q_grid: BlockGrid, layout: KvLayout, blocks: Tensor) -> Tensor:
    """Say which keys are seen from query blocks `[N]`, `[B or 1, 1, N, Lk]` bool."""
    rows = mask[:, blocks // _per_latent(q_grid.blocks, q_grid)]
    return _columns(rows, layout, [part.grid.tokens for part in layout.segments])[:, None]


def _columns(rows: Tensor, layout: KvLayout, sizes: list[int]) -> Tensor:
    """Spread latents over so many blocks or tokens of each segment."""
    parts, start = [], 0
    for segment, size in zip(layout.segments, sizes, strict=True):
        if segment.role == "text":
            parts.append(rows.new_ones(1, 1, 1).expand(*rows.shape[:2], size))
            continue
        latents = segment.grid.grid[0]
        columns = rows[:, :, start : start + latents]
        parts.append(columns.repeat_interleave(_per_latent(size, segment.grid), 2))
        start += latents
    return torch.cat(parts, 2)


def _per_latent(size: int, grid: BlockGrid) -> int:
    return size // max(grid.grid[0], 1)


def _latents(layout: KvLayout) -> list[Segment]:
    return [segment for segment in layout.segments if segment.role != "text"]
