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
    if provider is not None:
        chosen = registry.load_provider("pool", provider)
        reason = getattr(chosen, "why_not", lambda *_: None)(x, grid)
        if reason:
            raise ValueError(f"provider {provider!r} cannot pool: {reason}; leave provider unset")
        return chosen.pool_blocks(x, grid)
    for _, candidate in registry.providers_for("pool", x.device):
        if getattr(candidate, "why_not", lambda *_: None)(x, grid) is None:
            return candidate.pool_blocks(x, grid)
    raise AssertionError("the reference takes every call")
