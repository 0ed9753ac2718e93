"""Pool with whole-tensor operations: views where every tile is full, weights where not."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lipass.kernels.plan import BlockGrid


def why_not(x: Tensor, grid: BlockGrid) -> str | None:
    """Refuse nothing: any grid and dtype will do."""
    return None


def pool_blocks(x: Tensor, grid: BlockGrid) -> Tensor:
    """Average the tokens of each block; see `lipass.kernels.pool.api`."""
    index = grid.token_index(x.device).clamp(min=0).flatten()
    tiles = x.index_select(2, index).unflatten(2, (grid.blocks, grid.block_tokens)).float()
    if grid.is_full:
        return tiles.mean(3)
    return (tiles * _weights(grid, x.device)).sum(3)


@functools.lru_cache(maxsize=512)
def _weights(grid: BlockGrid, device: torch.device) -> Tensor:
    valid = grid.valid(device)
    return (valid / valid.sum(-1, keepdim=True))[..., None]
