"""Pool on the CPU in the library that block-sparse attention is built in."""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels.block_sparse import native
from lipass.kernels.plan import BlockGrid


def why_not(x: Tensor, grid: BlockGrid) -> str | None:
    """Refuse what is not on the CPU, and everything while the library is not built."""
    if x.device.type != "cpu":
        return f"runs on CPU tensors, got {x.device.type}"
    if x.dtype not in native.DTYPES:
        return f"averages fp32, bf16 and fp16, got {x.dtype}"
    return native.why_not_loaded()


def pool_blocks(x: Tensor, grid: BlockGrid) -> Tensor:
    """Average the tokens of each block; see `lipass.kernels.pool.api`."""
    means: Tensor = torch.ops.lipass_native.pool_blocks(x.detach(), [*grid.grid, *grid.tile])
    return means
