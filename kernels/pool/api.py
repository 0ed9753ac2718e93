"""Check the arguments of block pooling and send the call to a provider."""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels import registry
from lipass.kernels.plan import BlockGrid


def pool_blocks(x: Tensor, grid: BlockGrid, *, provider: str | None = None) -> Tensor:
    """Average the tokens of each block.

    Args:
        x: tokens `[B, H, L, D]`, row-major over the grid, any strides.
        grid: how the tokens fall into tiles; slots outside it are not tokens.
        provider: implementation to use; by default the best that takes the call.

    Returns:
        Means `[B, H, N, D]` fp32.

    Raises:
        ValueError: if `x` does not have the tokens of the grid, or the provider refuses.
    """
    if not torch.compiler.is_compiling() and (x.dim() != 4 or x.shape[2] != grid.tokens):
        raise ValueError(
            f"x must be [B, H, {grid.tokens}, D] for grid {grid.grid}, got {tuple(x.shape)}; "
            "pass the tokens of one segment"
        )
    chosen = registry.choose("pool", x.device, provider, lambda module: module.why_not(x, grid))
    return chosen.module.pool_blocks(x, grid)
