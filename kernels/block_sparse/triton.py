"""Attend over key blocks on a GPU, addressed in place, with an online softmax.

Text, history and current keys are read where they lie and never joined: copying all keys in front
of a call costs a share of what visiting a fifth of them does. One program takes up to 128 queries
of one query block and walks the plan, one segment after the other. A key block id is turned into
tokens by arithmetic on the grid of its segment, not by a table: a second load in front of K and V
would cost one level of the software pipeline. Where a slot lies from the first one of its block is
kept as one number a row: kept as addresses, it spilled on sm_80. Differs from the kernel of arXiv
2605.31158 in: tails are masked, any tile volume from 32 to 256, 64-bit addresses, per-key bias,
log-sum-exp.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipass.kernels import chip
from lipass.kernels.block_sparse.kind import Kind
from lipass.kernels.plan import BlockPlan, KvLayout
from lipass.kernels.token_major import empty_token_major

HEAD_DIMS = (64, 80, 96, 112, 128)
TILE_VOLUMES = (32, 64, 128, 256)
# Rows, columns, warps and stages per major compute capability: what compiles without spills at
# head dim 128, tails and bias included (ptxas of triton 3.7.1). 128 x 128 spills on sm_80 and
# sm_100, and on sm_90 with a bias. Shared memory 96, 96, 128 and 96 KiB; chips have 99 (sm_86,
# sm_89, sm_120), 163 (sm_80) and 227 (sm_90, sm_100).
_LAUNCH = {8: (64, 128, 8, 2), 9: (128, 64, 8, 3), 10: (128, 64, 8, 3), 12: (64, 128, 8, 2)}
# The kernel holds the description of so many segments: text, history, current.
_SEGMENTS = 3

# The interpreter multiplies bf16 matrices wrongly (triton 3.7.1), and takes any head dim.
_INTERPRETED = chip.INTERPRETED


class Launch(NamedTuple):
    """Compile-time choices of one call."""

    rows: int
    columns: int
    warps: int
    stages: int


@functools.lru_cache(maxsize=512)
def why_not(kind: Kind) -> str | None:
    """Give the reason why the kernel cannot take a call, or None."""
    if why := chip.why_not(kind.device):
        return why
    if kind.dtype not in (torch.bfloat16, torch.float16) and not _INTERPRETED:
        return f"takes bf16 and fp16, got {kind.dtype}"
    if kind.dim not in HEAD_DIMS and not _INTERPRETED:
        return f"takes head dims {HEAD_DIMS}, got {kind.dim}"
    volumes = (kind.q_volume, kind.k_volume)
    if any(volume not in TILE_VOLUMES for volume in volumes):
        return f"takes tile volumes {TILE_VOLUMES}, got {volumes[0]} queries, {volumes[1]} keys"
    if kind.records:
        return "has no backward, and q, k, v or a bias requires one"
    return None


def block_sparse_attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    plan: BlockPlan,
    *,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend; see `lipass.kernels.block_sparse.api`."""
    batch, heads, tokens, dim = q.shape
    q = _dense_rows(q)
    k, v = _segments(keys, plan.kv), _segments(values, plan.kv)
    out = empty_token_major(q)
    lse = None
    if return_lse:
        lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    bias = _bias(plan, key_bias)
    indices, counts = plan.indices.contiguous(), plan.counts.contiguous()
    launch = launch_options(
        plan.q_grid.block_tokens, plan.kv.block_tokens, chip.capability(q.device)[0]
    )
    parts = plan.q_grid.block_tokens // launch.rows
    grid = (plan.q_grid.blocks * parts, batch * heads)
    with chip.launching_on(q.device):
        block_sparse_kernel[grid](
            q,
            *k,
            *v,
            out,
            counts if lse is None else lse,
            indices,
            counts,
            bias if bias is not None else counts,
            scale * math.log2(math.e),
            heads,
            plan.q_grid.blocks,
            indices.shape[-1],
            tokens,
            *_bias_strides(bias),
            *q.stride()[:3],
            *(stride for part in k + v for stride in part.stride()[:3]),
            *plan.q_grid.grid,
            *segment_fields(plan.kv),
            **segment_constants(plan.kv, plan.shared_segments),
            D=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            ROWS=launch.rows,
            COLUMNS=launch.columns,
            Q_TILE=plan.q_grid.tile,
            TAILS=not (plan.kv.is_full and plan.q_grid.is_full),
            BIAS=bias is not None,
            LSE=return_lse,
            UPCAST=_INTERPRETED,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    return out, lse


def launch_options(q_volume: int, k_volume: int, capability: int) -> Launch:
    """Choose rows, columns, warps and stages; no autotuning, so the first frame is no slower.

    Args:
        q_volume: slots of a query tile.
        k_volume: slots of a key tile.
        capability: major compute capability; unknown ones get what needs the least memory.
    """
    rows, columns, warps, stages = _LAUNCH.get(capability, _LAUNCH[8])
    rows, columns = min(rows, q_volume), min(columns, k_volume)
    return Launch(rows, columns, warps if rows * columns >= 64 * 128 else 4, stages)


@functools.lru_cache(maxsize=512)
def segment_fields(layout: KvLayout) -> tuple[int, ...]:
    """Describe three segments to the kernel, 7 numbers each; unused ones have no block."""
    fields: list[int] = []
    for number, segment in enumerate(layout.segments):
        grid = segment.grid
        _, block_y, block_x = grid.block_shape
        # At least one, because the kernel divides by them; an empty segment has no block anyway.
        shape = (max(block_y, 1), max(block_x, 1))
        fields += [grid.blocks, layout.token_range(number).start, *grid.grid, *shape]
    none = [0, 0, 0, 1, 1, 1, 1]
    return (*fields, *none * (_SEGMENTS - len(layout.segments)))


def segment_constants(layout: KvLayout, shared: tuple[int, ...]) -> dict[str, Any]:
    """Say what the compiler knows of segments: their tiles, and of which blocks are chosen.

    Args:
        layout: the key segments.
        shared: those that every query block is known to visit whole.
    """
    tiles = [segment.grid.tile for segment in layout.segments]
    missing = _SEGMENTS - len(tiles)
    tiles += tiles[:1] * missing
    chosen = tuple(n not in shared for n in range(len(layout.segments))) + (False,) * missing
    has = tuple(segment.grid.blocks > 0 for segment in layout.segments) + (False,) * missing
    names = ("A_TILE", "B_TILE", "C_TILE")
    return {**dict(zip(names, tiles, strict=True)), "CHOSEN": chosen, "HAS": has}


def _segments(parts: list[Tensor], layout: KvLayout) -> list[Tensor]:
    """Return one tensor per segment, and any for segments that the layout lacks."""
    if len(parts) == 1:
        ranges = [layout.token_range(number) for number in range(len(layout.segments))]
        parts = [parts[0].narrow(2, found.start, len(found)) for found in ranges]
    rows = [_dense_rows(part) for part in parts]
    return rows + rows[:1] * (_SEGMENTS - len(rows))


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bias(plan: BlockPlan, key_bias: Tensor | None) -> Tensor | None:
    """Fold masked keys into the bias, `[B or 1, H or 1, Lk]` fp32."""
    if plan.key_keep is None:
        return None if key_bias is None else key_bias.float().contiguous()
    open_keys = torch.zeros((), device=plan.key_keep.device) if key_bias is None else key_bias
    return torch.where(plan.key_keep[:, None], open_keys.float(), -math.inf).contiguous()


def _bias_strides(bias: Tensor | None) -> tuple[int, int]:
    if bias is None:
        return 0, 0
    batch, heads = (bias.stride(axis) if bias.shape[axis] > 1 else 0 for axis in (0, 1))
    return batch, heads


# Sizes that change from chunk to chunk must not compile anew when one happens to be 1 or 16.
_PLAIN = [
    "q_blocks",
    "width",
    "q_tokens",
    "size_t",
    *(
        f"{segment}{field}"
        for segment in "abc"
        for field in ("_blocks", "_first", "_t", "_y", "_x", "_ny", "_nx")
    ),
]


@triton.jit(do_not_specialize=_PLAIN)
def block_sparse_kernel(
    q_ptr,
    k_a_ptr,
    k_b_ptr,
    k_c_ptr,
    v_a_ptr,
    v_b_ptr,
    v_c_ptr,
    out_ptr,
    lse_ptr,
    index_ptr,
    count_ptr,
    bias_ptr,
    scale_log2,
    heads,
    q_blocks,
    width,
    q_tokens,
    bias_stride_b,
    bias_stride_h,
    q_stride_b,
    q_stride_h,
    q_stride_l,
    k_a_stride_b,
    k_a_stride_h,
    k_a_stride_l,
    k_b_stride_b,
    k_b_stride_h,
    k_b_stride_l,
    k_c_stride_b,
    k_c_stride_h,
    k_c_stride_l,
    v_a_stride_b,
    v_a_stride_h,
    v_a_stride_l,
    v_b_stride_b,
    v_b_stride_h,
    v_b_stride_l,
    v_c_stride_b,
    v_c_stride_h,
    v_c_stride_l,
    size_t,
    size_y,
    size_x,
    a_blocks,
    a_first,
    a_t,
    a_y,
    a_x,
    a_ny,
    a_nx,
    b_blocks,
    b_first,
    b_t,
    b_y,
    b_x,
    b_ny,
    b_nx,
    c_blocks,
    c_first,
    c_t,
    c_y,
    c_x,
    c_ny,
    c_nx,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    Q_TILE: tl.constexpr,
    A_TILE: tl.constexpr,
    B_TILE: tl.constexpr,
    C_TILE: tl.constexpr,
    CHOSEN: tl.constexpr,
    HAS: tl.constexpr,
    TAILS: tl.constexpr,
    BIAS: tl.constexpr,
    LSE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend from `ROWS` queries of one query block to the key blocks of its plan.

    `a`, `b` and `c` are the segments: keys and values with their strides, blocks, first token,
    grid, blocks along y and x. As arguments they stay in constant memory; loaded they would fill
    registers. Of those that are `CHOSEN` the ids of blocks are read, others are visited whole.
    """
    Q_PARTS: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2] // ROWS
    q_block = tl.program_id(0) // Q_PARTS
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    dims = tl.arange(0, BLOCK_D)

    # Queries of this program.
    blocks_y = tl.cdiv(size_y, Q_TILE[1])
    blocks_x = tl.cdiv(size_x, Q_TILE[2])
    slot = (tl.program_id(0) % Q_PARTS) * ROWS + tl.arange(0, ROWS)
    at_t = q_block // (blocks_x * blocks_y) * Q_TILE[0] + slot // (Q_TILE[1] * Q_TILE[2])
    at_y = q_block // blocks_x % blocks_y * Q_TILE[1] + slot // Q_TILE[2] % Q_TILE[1]
    at_x = q_block % blocks_x * Q_TILE[2] + slot % Q_TILE[2]
    row = ((at_t * size_y + at_y) * size_x + at_x).to(tl.int64)
    row_exists = (at_t < size_t) & (at_y < size_y) & (at_x < size_x)
    q_base = q_ptr + batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    q_mask = row_exists[:, None] & (dims < D)[None, :]
    q = tl.load(q_base + row[:, None] * q_stride_l + dims[None, :], mask=q_mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)

    item, of = batch.to(tl.int64), head.to(tl.int64)
    plan = tl.program_id(1).to(tl.int64) * q_blocks + q_block
    visits = tl.load(count_ptr + plan)
    ids = index_ptr + plan * width
    visits_a, visits_b, visits_c = visits_by_segment(
        ids, visits, a_blocks, b_blocks, c_blocks, CHOSEN
    )

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if HAS[0]:
        peak, total, acc = _walk(
            q, k_a_ptr + item * k_a_stride_b + of * k_a_stride_h,
            v_a_ptr + item * v_a_stride_b + of * v_a_stride_h,
            bias_ptr + item * bias_stride_b + of * bias_stride_h + a_first,
            ids, 0, visits_a, k_a_stride_l, v_a_stride_l, a_t, a_y, a_x, a_ny,
            a_nx, peak, total, acc, scale_log2, A_TILE, COLUMNS, D, BLOCK_D,
            CHOSEN[0], TAILS, BIAS, UPCAST,
        )  # fmt: skip
    if HAS[1]:
        peak, total, acc = _walk(
            q, k_b_ptr + item * k_b_stride_b + of * k_b_stride_h,
            v_b_ptr + item * v_b_stride_b + of * v_b_stride_h,
            bias_ptr + item * bias_stride_b + of * bias_stride_h + b_first,
            ids + visits_a, a_blocks, visits_b, k_b_stride_l, v_b_stride_l, b_t, b_y, b_x, b_ny,
            b_nx, peak, total, acc, scale_log2, B_TILE, COLUMNS, D, BLOCK_D,
            CHOSEN[1], TAILS, BIAS, UPCAST,
        )  # fmt: skip
    if HAS[2]:
        peak, total, acc = _walk(
            q, k_c_ptr + item * k_c_stride_b + of * k_c_stride_h,
            v_c_ptr + item * v_c_stride_b + of * v_c_stride_h,
            bias_ptr + item * bias_stride_b + of * bias_stride_h + c_first,
            ids + visits_a + visits_b, a_blocks + b_blocks, visits_c, k_c_stride_l, v_c_stride_l,
            c_t, c_y, c_x, c_ny, c_nx, peak, total, acc, scale_log2, C_TILE, COLUMNS, D, BLOCK_D,
            CHOSEN[2], TAILS, BIAS, UPCAST,
        )  # fmt: skip

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = (batch.to(tl.int64) * q_tokens + row) * heads + head
    tl.store(out_ptr + at[:, None] * D + dims[None, :], out.to(out_ptr.dtype.element_ty), q_mask)
    if LSE:
        flat = tl.program_id(1).to(tl.int64) * q_tokens + row
        lse = (peak + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + flat, tl.where(total == 0.0, float("-inf"), lse), row_exists)


@triton.jit
def _walk(
    q, k_ptr, v_ptr, bias_ptr, ids, first, visits, k_stride, v_stride, size_t, size_y, size_x,
    blocks_y, blocks_x, peak, total, acc, scale_log2, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHOSEN: tl.constexpr, TAILS: tl.constexpr,
    BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Visit blocks of one segment, whose first one has the id `first`."""
    PARTS: tl.constexpr = TILE[0] * TILE[1] * TILE[2] // COLUMNS
    slot = tl.arange(0, COLUMNS)
    in_t = slot // (TILE[1] * TILE[2])
    in_y = slot // TILE[2] % TILE[1]
    in_x = slot % TILE[2]
    # Where a slot lies from the first one of its part is the same in every block.
    place = (in_t * size_y + in_y) * size_x + in_x
    dims = tl.arange(0, BLOCK_D)
    for step in range(0, visits * PARTS):
        if CHOSEN:
            local = tl.load(ids + step // PARTS) - first
        else:
            local = step // PARTS
        # All sizes of a tile are powers of two, so the slots of a part are those of the first,
        # moved along the axes.
        part = step % PARTS * COLUMNS
        from_t = local // (blocks_x * blocks_y) * TILE[0] + part // (TILE[1] * TILE[2])
        from_y = local // blocks_x % blocks_y * TILE[1] + part // TILE[2] % TILE[1]
        from_x = local % blocks_x * TILE[2] + part % TILE[2]
        at = ((from_t * size_y + from_y) * size_x + from_x + place).to(tl.int64)
        if TAILS or BIAS:
            exists = (in_t < size_t - from_t) & (in_y < size_y - from_y) & (in_x < size_x - from_x)
        if TAILS:
            mask = exists[:, None] & (dims < D)[None, :]
        else:
            mask = (dims < D)[None, :]
        k = tl.load(k_ptr + at[:, None] * k_stride + dims[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + at[:, None] * v_stride + dims[None, :], mask=mask, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if BIAS:
            bias = tl.load(bias_ptr + at, mask=exists, other=float("-inf"))
            score += bias[None, :] * 1.4426950408889634
        elif TAILS:
            score = tl.where(exists[None, :], score, float("-inf"))
        peak_new = tl.maximum(peak, tl.max(score, 1))
        base = peak_new
        if BIAS or PARTS > 1:
            # A row that has seen no key yet, as a part may lie outside of the grid, keeps -inf;
            # 0 stands in, so that no -inf - -inf arises.
            base = tl.where(peak_new == float("-inf"), 0.0, peak_new)
        shrink = tl.exp2(peak - base)
        weight = tl.exp2(score - base[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        peak = peak_new
    return peak, total, acc


@triton.jit
def visits_by_segment(ids, visits, a_blocks, b_blocks, c_blocks, CHOSEN: tl.constexpr):
    """Split the `visits` ids of a row among three segments of so many blocks.

    Blocks are numbered over the segments and ids ascend, so each segment has a run of them. Of
    segments that are not `CHOSEN` every block is visited, so nothing is counted where one is.
    """
    if CHOSEN[0] and (CHOSEN[1] or CHOSEN[2]):
        visits_a = _count_below(ids, visits, a_blocks)
    elif CHOSEN[0]:
        visits_a = visits - b_blocks - c_blocks
    else:
        visits_a = a_blocks
    if CHOSEN[1] and CHOSEN[2]:
        visits_b = _count_below(ids, visits, a_blocks + b_blocks) - visits_a
    elif CHOSEN[1]:
        visits_b = visits - visits_a - c_blocks
    else:
        visits_b = b_blocks
    return visits_a, visits_b, visits - visits_a - visits_b


@triton.jit
def _count_below(ids, visits, bound):
    """Count the ids of a row that are below a bound."""
    found = tl.zeros([128], tl.int32)
    for start in range(0, visits, 128):
        place = start + tl.arange(0, 128)
        found += (tl.load(ids + place, mask=place < visits, other=bound) < bound).to(tl.int32)
    return tl.sum(found, 0)
