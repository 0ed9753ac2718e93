"""Attend over key blocks on Hopper and Blackwell; a (t, y, x) tile is one load of the TMA unit.

A descriptor of the host says how a tensor is a grid of rows, so that no address, stride or mask is
computed for an element: on sm_90 the loop is 520 instructions a warp for 128 queries and 128 keys,
in place of 1,420. Slots outside the grid arrive as zeros and are closed behind a branch that whole
tiles skip; the output is cut by the same unit. Segments are walked one after the other, each with
descriptors of its own, and only where blocks are chosen are their ids read. Has not run on a GPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lipass.kernels import chip
from lipass.kernels.block_sparse.kind import Kind
from lipass.kernels.block_sparse.triton import visits_by_segment
from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout
from lipass.kernels.token_major import empty_token_major

HEAD_DIMS = (64, 128)
TILE_VOLUMES = (64, 128)
# Major compute capabilities that load tensors and have products that read shared memory.
_CAPABILITIES = (9, 10)
# Where a block begins is one int32 of the table, so many bits along y and x and the rest along t.
_Y_BITS, _X_BITS = 10, 11
_LARGEST = ((1 << 10) - 1, (1 << _Y_BITS) - 1, (1 << _X_BITS) - 1)
# The TMA unit takes addresses and strides that are multiples of 16 bytes.
_ALIGNED = 16
_LOG2_E = math.log2(math.e)
_SEGMENTS = 3
# Descriptors of the kernel: queries, output, keys and values of each segment.
_PLACES = 2 + 2 * _SEGMENTS
# Keys and values of so many blocks at once: 128 KiB of shared memory for 128 slots of 128 numbers,
# as queries stay in registers.
STAGES = 2


@functools.lru_cache(maxsize=512)
def why_not(kind: Kind) -> str | None:
    """Give the reason why the kernel cannot take a call, or None."""
    if why := chip.why_not(kind.device):
        return why
    if chip.capability(kind.device)[0] not in _CAPABILITIES:
        return f"needs a chip of compute capability 9 or 10, got {chip.capability(kind.device)}"
    if kind.dtype not in (torch.bfloat16, torch.float16) and not chip.INTERPRETED:
        return f"takes bf16 and fp16, got {kind.dtype}"
    if kind.dim not in HEAD_DIMS and not chip.INTERPRETED:
        return f"takes head dims {HEAD_DIMS}, got {kind.dim}"
    volumes = (kind.q_volume, kind.k_volume)
    if any(volume not in TILE_VOLUMES for volume in volumes) and not chip.INTERPRETED:
        return f"takes tile volumes {TILE_VOLUMES}, got {volumes[0]} queries, {volumes[1]} keys"
    if kind.records:
        return "has no backward, and q, k, v or a bias requires one"
    return None


def lay(
    q: Tensor, keys: list[Tensor], values: list[Tensor], q_grid: BlockGrid, kv: KvLayout,
    biased: bool,
) -> Laid | str:  # fmt: skip
    """Describe tensors to the TMA unit, or give the reason why that cannot be.

    Args:
        q: queries `[B, H, Lq, D]`.
        keys: one tensor `[B, H, L, D]` per segment, or one of all.
        values: like `keys`.
        q_grid: grid of the queries.
        kv: the key segments.
        biased: whether scores get a bias, or keys inside a visited block are masked.
    """
    if why := unfit_tensors(q, keys, values, biased):
        return why
    strides = tuple([x.stride() for x in (*keys, *values)])
    return describe(q.shape, q.dtype, q.stride(), strides, q_grid, kv)


def unfit_tensors(q: Tensor, keys: list[Tensor], values: list[Tensor], biased: bool) -> str | None:
    """Say what of a call the TMA unit cannot do, wherever its tensors lie."""
    if biased:
        return "adds no bias and masks no key inside a block"
    for x in (q, *keys, *values):
        if x.data_ptr() % _ALIGNED:
            return "takes tensors that begin at multiples of 16 bytes"
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
    laid: Laid | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend; see `lipass.kernels.block_sparse.api`. `laid` is what `lay` said of the tensors."""
    assert key_bias is None
    assert plan.key_keep is None
    batch, heads, tokens, dim = q.shape
    made = geometry(plan.q_grid, plan.kv, plan.shared_segments, q.device)
    if laid is None:
        found = lay(q, keys, values, plan.q_grid, plan.kv, False)
        assert isinstance(found, Laid)
        laid = found
    out = empty_token_major(q)
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32) if return_lse else plan.counts
    descriptors = described(laid, q, out, keys, values, plan.kv)
    indices, counts = plan.indices.contiguous(), plan.counts.contiguous()
    programs = (plan.q_grid.blocks, batch * heads)
    with chip.launching_on(q.device):
        tma_kernel[programs](
            *descriptors,
            lse,
            indices,
            counts,
            made.corners,
            scale * _LOG2_E,
            heads,
            plan.q_grid.blocks,
            indices.shape[-1],
            tokens,
            *made.numbers,
            D=dim,
            FOLDS=laid.folds,
            STAGES=STAGES,
            LSE=return_lse,
            UPCAST=chip.INTERPRETED,
            **made.constants,
            num_warps=4 if plan.q_grid.block_tokens <= 64 else 8,
            num_stages=STAGES,
        )
    give_back(laid, descriptors)
    return out, lse if return_lse else None


class Geometry(NamedTuple):
    """What follows from grids alone, whatever the tensors hold."""

    corners: Tensor
    """Where each block begins, `t << 21 | y << 11 | x`, `[Nk]` int32."""
    numbers: tuple[int, ...]
    """Blocks of each segment, the grid of the queries, and those of the segments."""
    constants: dict[str, Any]


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def geometry(
    q_grid: BlockGrid, kv: KvLayout, shared: tuple[int, ...], device: torch.device
) -> Geometry:
    """Describe grids to the kernel; tables are built on the host and moved once."""
    found = [(n, part.grid) for n, part in enumerate(kv.segments) if part.grid.blocks]
    grids = [grid for _, grid in found]
    padded = grids + [BlockGrid((0, 1, 1), (1, 1, kv.block_tokens))] * (_SEGMENTS - len(grids))
    rows = tuple(grid.is_row for grid in padded)
    constants: dict[str, Any] = {
        "Q_TILE": q_grid.tile,
        **dict(zip(("A_TILE", "B_TILE", "C_TILE"), (grid.tile for grid in padded), strict=True)),
        "ROW": rows,
        "TAILS": tuple(not grid.is_full for grid in padded),
        "CHOSEN": tuple(n not in shared for n, _ in found) + (False,) * (_SEGMENTS - len(found)),
        "HAS": tuple(n < len(found) for n in range(_SEGMENTS)),
    }
    corners = torch.cat([_corners(grid) for grid in grids] or [torch.zeros(1).int()])
    blocks = tuple(grid.blocks for grid in padded)
    numbers = (*blocks, *q_grid.grid, *(size for grid in padded for size in grid.grid))
    return Geometry(corners.to(device), numbers, constants)


def _corners(grid: BlockGrid) -> Tensor:
    block = torch.arange(grid.blocks, device="cpu")
    if grid.is_row:
        return torch.zeros_like(block).int()  # not read: block times slots
    (_, n_y, n_x), (t, y, x) = grid.block_shape, grid.tile
    at_t, at_y, at_x = block // (n_y * n_x) * t, block // n_x % n_y * y, block % n_x * x
    return (at_t << (_Y_BITS + _X_BITS) | at_y << _X_BITS | at_x).int()


def _by_segment(x: Tensor, kv: KvLayout) -> list[Tensor]:
    return list(x.split([segment.grid.tokens for segment in kv.segments], 2))


class Laid(NamedTuple):
    """How the tensors of a call lie in memory, as the kernel is told it."""

    order: tuple[int, ...]
    """Numbers of the segments that have a block."""
    fields: list[dict[str, Any]]
    """Of the descriptors of queries, output, and keys and values, but for the tensors."""
    folds: tuple[int, ...]
    made_of: type
    """Class of the descriptors."""
    spare: list[list[Any]]
    """Descriptors that no call uses: making those of a call takes 2 us."""


@functools.lru_cache(maxsize=1024)
def describe(
    q_shape: torch.Size,
    dtype: torch.dtype,
    q_stride: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    q_grid: BlockGrid,
    kv: KvLayout,
) -> Laid | str:
    """Do so once for all tensors that lie alike: checking descriptors takes 5 us each."""
    if why := _unfit_grids(q_grid, kv):
        return why
    batch, heads, tokens, dim = q_shape
    if tokens == 0:
        return "takes a query at least, got none"
    segments = len(kv.segments)
    if len(strides) < 2 * segments:
        strides = (strides[0],) * segments + (strides[1],) * segments
    order = tuple(n for n, part in enumerate(kv.segments) if part.grid.blocks)
    row = heads * dim
    placed = [(q_stride, q_grid), ((tokens * row, dim, row, 1), q_grid)]
    for n in order:
        grid = kv.segments[n].grid
        placed += [(strides[n], grid), (strides[segments + n], grid)]
    fields, folds = [], []
    for stride, grid in placed:
        fold = _fold(batch, heads, grid.tokens, dim, stride, dtype.itemsize)
        if fold is None:
            shape = (batch, heads, grid.tokens, dim)
            return (
                "takes heads that lie side by side or apart by one stride, with strides that are "
                f"multiples of 16 bytes, got shape {shape} and strides {stride}"
            )
        fields.append(_fields(batch, heads, dim, stride, dtype, grid, fold))
        folds.append(fold)
    del folds[1]  # the output's
    folds += [1] * (_PLACES - 1 - len(folds))
    return Laid(order, fields, tuple(folds), TensorDescriptor, [])


def _unfit_grids(q_grid: BlockGrid, kv: KvLayout) -> str | None:
    for grid in (q_grid, *(segment.grid for segment in kv.segments)):
        if not grid.is_row and any(
            size > most for size, most in zip(grid.grid, _LARGEST, strict=True)
        ):
            return f"takes grids up to {_LARGEST}, got {grid.grid}"
        if max(grid.tile) > 256:
            return f"takes tiles up to 256 along each axis, got {grid.tile}"
    return None


def _fold(
    batch: int, heads: int, tokens: int, dim: int, stride: tuple[int, ...], number_bytes: int
) -> int | None:
    """Say how heads fit a descriptor: 1 side by side, 0 folded into the batch, None not at all."""
    per_batch, per_head, per_token, last = stride
    apart = [per_batch] * (batch > 1) + [per_head] * (heads > 1) + [per_token] * (tokens > 1)
    if last != 1 or any(step <= 0 or step * number_bytes % _ALIGNED for step in apart):
        return None
    if heads == 1 or (per_head == dim and (tokens == 1 or heads * dim <= per_token)):
        return 1
    return 0 if batch == 1 or per_batch == heads * per_head else None


def _fields(
    batch: int, heads: int, dim: int, stride: tuple[int, ...], dtype: torch.dtype,
    grid: BlockGrid, fold: int,
) -> dict[str, Any]:  # fmt: skip
    """Spell `[B, H, T*Y*X, D]` in five axes: batch (and heads), t, y, x, a row (of all heads)."""
    (t, y, x), row = grid.grid, stride[2]
    if grid.tokens == 1:
        row = heads * dim  # a stride over one token is anything
    rows = [y * x * row, x * row, row, 1]
    if fold:
        sizes, outer = [batch, t, y, x, heads * dim], stride[0]
    else:
        sizes, outer = [batch * heads, t, y, x, dim], stride[1]
    if sizes[0] == 1:
        outer = t * rows[0]
    empty = torch.empty(0, dtype=dtype, device="cpu")
    fields = vars(TensorDescriptor(empty, sizes, [outer, *rows], [1, *grid.tile, dim]))
    return {name: field for name, field in fields.items() if name != "base"}


def described(
    laid: Laid, q: Tensor, out: Tensor, keys: list[Tensor], values: list[Tensor], kv: KvLayout
) -> list[Any]:
    """Describe the tensors of a call; kernels with fewer segments get the first one again."""
    if len(keys) == 1 and len(kv.segments) > 1:
        keys, values = _by_segment(keys[0], kv), _by_segment(values[0], kv)
    placed = [q, out]
    for number in laid.order:
        placed += [keys[number], values[number]]
    try:
        made = laid.spare.pop()  # in one step: another thread may be here
    except IndexError:
        made = [object.__new__(laid.made_of) for _ in placed]
        for descriptor, fields in zip(made, laid.fields, strict=True):
            descriptor.__dict__.update(fields)
        made += made[:1] * (_PLACES - len(made))
    for descriptor, x in zip(made, placed):  # noqa: B905  (the rest is the first one)
        descriptor.base = x
    return made


def give_back(laid: Laid, made: list[Any]) -> None:
    """Let other calls use descriptors, which hold no tensor meanwhile."""
    for descriptor in made:
        descriptor.base = None
    laid.spare.append(made)


# Sizes that change from chunk to chunk must not compile anew when one happens to be 1 or 16.
_PLAIN = [
    "q_blocks",
    "width",
    "q_tokens",
    "q_t",
    *(f"{segment}_{field}" for segment in "abc" for field in ("blocks", "t", "y", "x")),
]


@triton.jit(do_not_specialize=_PLAIN)
def tma_kernel(
    q_desc,
    out_desc,
    k_a_desc,
    v_a_desc,
    k_b_desc,
    v_b_desc,
    k_c_desc,
    v_c_desc,
    lse_ptr,
    index_ptr,
    count_ptr,
    corner_ptr,
    scale_log2,
    heads,
    q_blocks,
    width,
    q_tokens,
    a_blocks,
    b_blocks,
    c_blocks,
    q_t,
    q_y,
    q_x,
    a_t,
    a_y,
    a_x,
    b_t,
    b_y,
    b_x,
    c_t,
    c_y,
    c_x,
    D: tl.constexpr,
    Q_TILE: tl.constexpr,
    A_TILE: tl.constexpr,
    B_TILE: tl.constexpr,
    C_TILE: tl.constexpr,
    ROW: tl.constexpr,
    TAILS: tl.constexpr,
    CHOSEN: tl.constexpr,
    HAS: tl.constexpr,
    FOLDS: tl.constexpr,
    STAGES: tl.constexpr,
    LSE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend from one query block to the key blocks of its plan.

    `a`, `b` and `c` are the segments that have blocks, in order, and `HAS` which there are. Of
    those that are `CHOSEN` the ids of blocks are read, others are visited whole. `ROW`: blocks are
    runs of tokens. `FOLDS`: 1 where heads lie side by side in a row of `H * D`, 0 where they are
    folded into the batch axis; of the queries, then of keys and values of each segment.
    """
    ROWS: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2]
    q_block = tl.program_id(0)
    pair = tl.program_id(1)
    batch = pair // heads
    head = pair % heads
    n_y = tl.cdiv(q_y, Q_TILE[1])
    n_x = tl.cdiv(q_x, Q_TILE[2])
    t0 = q_block // n_x // n_y * Q_TILE[0]
    y0 = q_block // n_x % n_y * Q_TILE[1]
    x0 = q_block % n_x * Q_TILE[2]
    outer, column = (batch, head * D) if FOLDS[0] else (pair, 0)
    q = tl.reshape(q_desc.load([outer, t0, y0, x0, column]), [ROWS, D])
    if UPCAST:
        q = q.to(tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)

    plan = pair.to(tl.int64) * q_blocks + q_block
    visits = tl.load(count_ptr + plan)
    ids = index_ptr + plan * width
    visits_a, visits_b, visits_c = visits_by_segment(
        ids, visits, a_blocks, b_blocks, c_blocks, CHOSEN
    )

    if HAS[0]:
        peak, total, acc = _walk(
            q, k_a_desc, v_a_desc, ids, 0, visits_a, corner_ptr, a_t, a_y, a_x, batch, head, pair,
            peak, total, acc, scale_log2, A_TILE, D, CHOSEN[0], ROW[0], TAILS[0], FOLDS[1],
            FOLDS[2], STAGES, UPCAST,
        )  # fmt: skip
    if HAS[1]:
        peak, total, acc = _walk(
            q, k_b_desc, v_b_desc, ids + visits_a, a_blocks, visits_b, corner_ptr, b_t, b_y, b_x,
            batch, head, pair, peak, total, acc, scale_log2, B_TILE, D, CHOSEN[1], ROW[1],
            TAILS[1], FOLDS[3], FOLDS[4], STAGES, UPCAST,
        )  # fmt: skip
    if HAS[2]:
        peak, total, acc = _walk(
            q, k_c_desc, v_c_desc, ids + visits_a + visits_b, a_blocks + b_blocks, visits_c,
            corner_ptr, c_t, c_y, c_x, batch, head, pair, peak, total, acc, scale_log2, C_TILE,
            D, CHOSEN[2], ROW[2], TAILS[2], FOLDS[5], FOLDS[6], STAGES, UPCAST,
        )  # fmt: skip

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out = tl.reshape(out.to(out_desc.dtype), [1, Q_TILE[0], Q_TILE[1], Q_TILE[2], D])
    out_desc.store([batch, t0, y0, x0, head * D], out)  # what hangs over the grid is not written
    if LSE:
        slot = tl.arange(0, ROWS)
        t = t0 + slot // (Q_TILE[1] * Q_TILE[2])
        y = y0 + slot // Q_TILE[2] % Q_TILE[1]
        x = x0 + slot % Q_TILE[2]
        at = pair.to(tl.int64) * q_tokens + (t * q_y + y) * q_x + x
        lse = tl.where(total == 0.0, float("-inf"), (peak + tl.log2(total)) * 0.6931471805599453)
        tl.store(lse_ptr + at, lse, (t < q_t) & (y < q_y) & (x < q_x))


@triton.jit
def _walk(
    q, k_desc, v_desc, ids, first, visits, corner_ptr, size_t, size_y, size_x, batch, head, pair,
    peak, total, acc, scale_log2, TILE: tl.constexpr, D: tl.constexpr, CHOSEN: tl.constexpr,
    ROW: tl.constexpr, TAILS: tl.constexpr, K_FOLD: tl.constexpr, V_FOLD: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Visit blocks of one segment, whose first one has the id `first`."""
    COLUMNS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    k_outer, k_column = (batch, head * D) if K_FOLD else (pair, 0)
    v_outer, v_column = (batch, head * D) if V_FOLD else (pair, 0)
    for step in tl.range(0, visits, num_stages=STAGES):
        if CHOSEN:
            block = tl.load(ids + step)
        else:
            block = first + step
        if ROW:
            t0 = 0
            y0 = 0
            x0 = (block - first) * COLUMNS
        else:
            at = tl.load(corner_ptr + block)
            t0 = at >> 21
            y0 = (at >> 11) & 0x3FF
            x0 = at & 0x7FF
        k = tl.reshape(k_desc.load([k_outer, t0, y0, x0, k_column]), [COLUMNS, D])
        if UPCAST:
            k = k.to(tl.float32)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if TAILS:  # noqa: SIM102  (the compiler knows it)
            # One branch that all threads take or leave; whole tiles skip it.
            if (t0 + TILE[0] > size_t) | (y0 + TILE[1] > size_y) | (x0 + TILE[2] > size_x):
                slot = tl.arange(0, COLUMNS)
                exists = (
                    (slot // (TILE[1] * TILE[2]) < size_t - t0)
                    & (slot // TILE[2] % TILE[1] < size_y - y0)
                    & (slot % TILE[2] < size_x - x0)
                )
                score = tl.where(exists[None, :], score, float("-inf"))
        # A visited block has a token, so the peak is finite from the first one on. The scale is
        # applied to the maximum of a row and within the multiply-add of the exponent.
        peak_new = tl.maximum(peak, tl.max(score, 1) * scale_log2)
        weight = tl.exp2(score * scale_log2 - peak_new[:, None])
        shrink = tl.exp2(peak - peak_new)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        v = tl.reshape(v_desc.load([v_outer, t0, y0, x0, v_column]), [COLUMNS, D])
        if UPCAST:
            v = v.to(tl.float32)
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        peak = peak_new
    return peak, total, acc
