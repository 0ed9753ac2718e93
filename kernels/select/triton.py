"""Select on a GPU in one launch, without reading anything back.

A program serves a few query blocks of a head: it scores all candidates, finds the lowest score
that is still chosen, and writes the rows in ascending order. Rows share a program so that the
means of the candidates, 200 KiB for 400 of 128 numbers, are not read from L2 for each row. The
lowest chosen score is built bit by bit, each bit by one count over the candidates: any number of
them will do, and to count for each how many are better would take the square of their number.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipass.kernels import chip
from lipass.kernels.plan import BlockGrid, KvLayout
from lipass.kernels.select.vectorized import rule_of

# Query blocks of a program, candidates and numbers of a mean that it multiplies at once, and
# candidates that it counts at once. No chip spills (ptxas of triton 3.7.1); 64 columns did.
ROWS, COLUMNS, DEPTH, SCAN = 8, 32, 32, 128
WARPS = 4

_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_INT_MIN = tl.constexpr(torch.iinfo(torch.int32).min)
_INT_MAX = tl.constexpr(torch.iinfo(torch.int32).max)


def why_not(
    q_mean: Tensor, k_mean: Tensor, keep_frames: Tensor | None, seen: Tensor | None = None
) -> str | None:
    """Give the reason why the kernel cannot take a call, or None."""
    if why := chip.why_not(q_mean.device):
        return why
    if q_mean.dtype != torch.float32 or k_mean.dtype != torch.float32:
        return f"takes fp32 means, got {q_mean.dtype} and {k_mean.dtype}"
    if keep_frames is not None or seen is not None:
        what = "dropped frames" if seen is None else "masks"
        return f"has rows of one length only, and {what} make them differ"
    return None


def select_blocks(
    q_mean: Tensor,
    k_mean: Tensor,
    layout: KvLayout,
    q_grid: BlockGrid,
    *,
    budget: float,
    role: str,
    sink_latents: int,
    keep_frames: Tensor | None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose key blocks for each query block; see `lipass.kernels.select.api`.

    Of equal scores the lower block id is chosen.
    """
    batch, heads, q_blocks, dim = q_mean.shape
    rule = rule_of(layout, q_grid, budget, role, sink_latents, q_mean.device)
    candidates, protected = len(rule.candidates), rule.protected
    width = layout.blocks - candidates + rule.wanted
    shape = (batch, heads, q_blocks)
    indices = torch.empty((*shape, width), dtype=torch.int32, device=q_mean.device)
    order = torch.empty((*shape, candidates), dtype=torch.int32, device=q_mean.device)
    with chip.launching_on(q_mean.device):
        select_kernel[(-(-q_blocks // ROWS), batch * heads)](
            q_mean.contiguous(),
            k_mean.contiguous(),
            order if protected is None else protected,
            order,
            indices,
            q_blocks,
            candidates,
            rule.candidates.start,
            rule.wanted,
            width,
            candidates if protected is not None and protected.shape[0] > 1 else 0,
            D=dim,
            PROTECTED=protected is not None,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            DEPTH=DEPTH,
            SCAN=SCAN,
            num_warps=WARPS,
        )
    return indices, _full_counts(shape, width, q_mean.device)


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _full_counts(shape: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Rows of one length; nobody writes to the counts of a plan."""
    return torch.full(shape, width, dtype=torch.int32, device=device)


# Sizes that change from chunk to chunk must not compile anew when one happens to be 1 or 16.
_PLAIN = ["q_blocks", "candidates", "first", "wanted", "width", "protected_stride"]


@triton.jit(do_not_specialize=_PLAIN)
def select_kernel(
    q_ptr,
    k_ptr,
    protected_ptr,
    order_ptr,
    index_ptr,
    q_blocks,
    candidates,
    first,
    wanted,
    width,
    protected_stride,
    D: tl.constexpr,
    PROTECTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Fill `ROWS` rows of the plan.

    `order` is scratch: each score as an integer of the same order. `first` is the id of the first
    candidate; all blocks in front of the candidates and behind them are visited.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < q_blocks
    item = tl.program_id(1).to(tl.int64)
    plan = item * q_blocks + row
    order = order_ptr + plan[:, None] * candidates
    ids = index_ptr + plan[:, None] * width
    columns = tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    scan = tl.arange(0, SCAN)

    for start in range(0, candidates, COLUMNS):
        column = start + columns
        q_row = q_ptr + plan[:, None] * D
        k_row = k_ptr + (item * candidates + column)[None, :] * D
        score = tl.zeros([ROWS, COLUMNS], tl.float32)
        for from_d in range(0, D, DEPTH):
            d = from_d + depth
            q_mask = exists[:, None] & (d < D)[None, :]
            k_mask = (column < candidates)[None, :] & (d < D)[:, None]
            q = tl.load(q_row + d[None, :], mask=q_mask, other=0.0)
            k = tl.load(k_row + d[:, None], mask=k_mask, other=0.0)
            score = tl.dot(q, k, score, input_precision="ieee")
        score = tl.where(score == score, score, -_LARGEST)
        score = tl.minimum(tl.maximum(score, -_LARGEST), _LARGEST)
        mask = exists[:, None] & (column < candidates)[None, :]
        if PROTECTED:
            at = protected_ptr + row[:, None] * protected_stride + column[None, :]
            score = tl.where(tl.load(at, mask=mask, other=0), float("inf"), score)
        # Both zeros are equal as scores but not as integers.
        bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ _INT_MAX, bits)
        tl.store(order + column[None, :], bits, mask=mask)
    # Other threads read what this one wrote.
    tl.debug_barrier()

    lowest = tl.full([ROWS], _INT_MIN, tl.int32)
    bit = tl.full([ROWS], _INT_MIN, tl.int32)
    for _ in range(32):
        probe = lowest ^ bit
        reach = _count_above(order, probe - 1, exists, candidates, SCAN)
        lowest = tl.where(reach >= wanted, probe, lowest)
        bit = (bit >> 1) & _INT_MAX
    # Of those equal to the lowest, the first ones fill up the row.
    room = wanted - _count_above(order, lowest, exists, candidates, SCAN)

    equals = tl.zeros([ROWS], tl.int32)
    filled = tl.zeros([ROWS], tl.int32) + first
    for start in range(0, candidates, SCAN):
        column = start + scan
        mask = exists[:, None] & (column < candidates)[None, :]
        bits = tl.load(order + column[None, :], mask=mask, other=_INT_MIN)
        equal = (mask & (bits == lowest[:, None])).to(tl.int32)
        nth = equals[:, None] + tl.cumsum(equal, 1)
        chosen = mask & ((bits > lowest[:, None]) | ((equal == 1) & (nth <= room[:, None])))
        place = filled[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
        block = tl.broadcast_to((first + column)[None, :], [ROWS, SCAN])
        tl.store(ids + place, block, mask=chosen)
        equals += tl.sum(equal, 1)
        filled += tl.sum(chosen.to(tl.int32), 1)

    for start in range(0, width, SCAN):
        place = start + scan
        behind = place >= first + wanted
        block = tl.where(behind, place + candidates - wanted, place)
        always = (place < first) | (behind & (place < width))
        block = tl.broadcast_to(block[None, :], [ROWS, SCAN])
        tl.store(ids + place[None, :], block, mask=exists[:, None] & always[None, :])


@triton.jit
def _count_above(order, bar, exists, candidates, SCAN: tl.constexpr):
    """Count the candidates of each row whose integer is above `bar`, `[ROWS]`."""
    found = tl.zeros([bar.shape[0], SCAN], tl.int32)
    for start in range(0, candidates, SCAN):
        column = start + tl.arange(0, SCAN)
        mask = exists[:, None] & (column < candidates)[None, :]
        bits = tl.load(order + column[None, :], mask=mask, other=_INT_MIN)
        found += (bits > bar[:, None]).to(tl.int32)
    return tl.sum(found, 1)
