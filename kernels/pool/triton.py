"""Pool on a GPU in one launch: a program averages one block, its tokens read where they lie.

The whole-tensor form takes a launch for each axis of a tile, and where tiles hang over the grid it
adds with atomics, whose order changes from run to run. A token is found by arithmetic on the grid;
sums run slot by slot in fp32, in one order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipass.kernels import chip
from lipass.kernels.plan import BlockGrid

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Numbers that a program reads at once: 4 loads of 16 bytes for each of 128 threads where they are
# bf16, and no chip spills (ptxas of triton 3.7.1).
_NUMBERS = 4096
WARPS = 4


def why_not(x: Tensor, grid: BlockGrid) -> str | None:
    """Give the reason why the kernel cannot take a call, or None."""
    if why := chip.why_not(x.device):
        return why
    if x.dtype not in DTYPES:
        return f"takes bf16, fp16 and fp32, got {x.dtype}"
    if torch.is_grad_enabled() and x.requires_grad:
        return "has no backward, and x requires one"
    return None


def pool_blocks(x: Tensor, grid: BlockGrid) -> Tensor:
    """Average the tokens of each block; see `lipass.kernels.pool.api`."""
    batch, heads, _, dim = x.shape
    means = torch.empty((batch, heads, grid.blocks, dim), dtype=torch.float32, device=x.device)
    block_d, slots = _widths(dim, grid.block_tokens)
    with chip.launching_on(x.device):
        pool_kernel[(grid.blocks, batch * heads)](
            x,
            means,
            heads,
            *x.stride(),
            *grid.grid,
            D=dim,
            BLOCK_D=block_d,
            SLOTS=slots,
            TILE=grid.tile,
            num_warps=WARPS,
        )
    return means


@functools.lru_cache(maxsize=64)
def _widths(dim: int, volume: int) -> tuple[int, int]:
    """Choose how many numbers of a token and how many slots are read at once."""
    block_d = triton.next_power_of_2(dim)
    return block_d, slots_at_once(volume, block_d)


def slots_at_once(volume: int, block_d: int) -> int:
    """Choose how many of a tile's `volume` slots are read at once, a power of two."""
    return min(triton.next_power_of_2(volume), max(_NUMBERS // block_d, 1))


# Grids that change from chunk to chunk must not compile anew when a size happens to be 1 or 16.
@triton.jit(do_not_specialize=["size_t", "size_y", "size_x"])
def pool_kernel(
    x_ptr,
    mean_ptr,
    heads,
    x_stride_b,
    x_stride_h,
    x_stride_l,
    x_stride_d,
    size_t,
    size_y,
    size_x,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Average the tokens of one block, `SLOTS` of its slots at a time."""
    VOLUME: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    block = tl.program_id(0)
    head = (tl.program_id(1) % heads).to(tl.int64)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)

    blocks_y = tl.cdiv(size_y, TILE[1])
    blocks_x = tl.cdiv(size_x, TILE[2])
    from_t = block // (blocks_x * blocks_y) * TILE[0]
    from_y = block // blocks_x % blocks_y * TILE[1]
    from_x = block % blocks_x * TILE[2]
    base = x_ptr + batch * x_stride_b + head * x_stride_h + dims[None, :] * x_stride_d
    total = tl.zeros([SLOTS, BLOCK_D], tl.float32)
    for first in range(0, VOLUME, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        at_t = from_t + slot // (TILE[1] * TILE[2])
        at_y = from_y + slot // TILE[2] % TILE[1]
        at_x = from_x + slot % TILE[2]
        exists = (at_t < size_t) & (at_y < size_y) & (at_x < size_x) & (slot < VOLUME)
        token = ((at_t * size_y + at_y) * size_x + at_x).to(tl.int64)
        mask = exists[:, None] & (dims < D)[None, :]
        total += tl.load(base + token[:, None] * x_stride_l, mask=mask, other=0.0).to(tl.float32)

    # A block has at least one token, and along each axis those that exist come first.
    tokens_t = tl.minimum(size_t - from_t, TILE[0])
    tokens_y = tl.minimum(size_y - from_y, TILE[1])
    tokens_x = tl.minimum(size_x - from_x, TILE[2])
    mean = tl.div_rn(tl.sum(total, 0), (tokens_t * tokens_y * tokens_x).to(tl.float32))
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block
    tl.store(mean_ptr + row * D + dims, mean, mask=dims < D)
