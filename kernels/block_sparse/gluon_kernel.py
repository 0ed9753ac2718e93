"""Attend over key blocks on Hopper with warps that specialise: the kernel, in Triton's Gluon.

One warp fetches (t, y, x) tiles by the TMA unit into a ring of buffers in shared memory; two
groups of four warps, 64 queries each, multiply. In a group the scores of the next block are
computed beside the product of this one with its values, and its softmax beside the latter.
Barriers of each buffer say when it is full, and when both groups have read it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _fetch_segment(
    k_desc, v_desc, begin, visits, first, ids, corner_ptr, place, memory, bars,
    TILE: gl.constexpr, CHOSEN: gl.constexpr, ROW: gl.constexpr, K_FOLD: gl.constexpr,
    V_FOLD: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Fetch the blocks of one segment, each as soon as its buffer is free."""
    COLUMNS: gl.constexpr = TILE[0] * TILE[1] * TILE[2]
    BOX: gl.constexpr = (1, TILE[0], TILE[1], TILE[2], D)
    BYTES: gl.constexpr = COLUMNS * D * 2
    batch, head, pair, _, _, _ = place
    _, k_ring, v_ring = memory
    _, k_full, v_full, k_empty, v_empty = bars
    k_outer = batch if K_FOLD else pair
    k_column = head * D if K_FOLD else 0
    v_outer = batch if V_FOLD else pair
    v_column = head * D if V_FOLD else 0
    for step in range(begin, begin + visits):
        if CHOSEN:
            block = gl.load(ids + step)
        else:
            block = first + step - begin
        if ROW:
            t0 = 0
            y0 = 0
            x0 = (block - first) * COLUMNS
        else:
            at = gl.load(corner_ptr + block)
            t0 = at >> 21
            y0 = (at >> 11) & 0x3FF
            x0 = at & 0x7FF
        stage = step % STAGES
        # In the first round nobody has filled a buffer: waiting for the phase before it is over
        # at once.
        free = ((step // STAGES) & 1) ^ 1
        mbarrier.wait(k_empty.index(stage), free)
        mbarrier.expect(k_full.index(stage), BYTES)
        tma.async_copy_global_to_shared(
            k_desc, [k_outer, t0, y0, x0, k_column], k_full.index(stage),
            k_ring.index(stage).reshape(BOX),
        )  # fmt: skip
        mbarrier.wait(v_empty.index(stage), free)
        mbarrier.expect(v_full.index(stage), BYTES)
        tma.async_copy_global_to_shared(
            v_desc, [v_outer, t0, y0, x0, v_column], v_full.index(stage),
            v_ring.index(stage).reshape(BOX),
        )  # fmt: skip


@gluon.jit
def _fetch(
    descriptors, visits, firsts, ids, corner_ptr, place, memory, bars, HALF: gl.constexpr,
    STEP: gl.constexpr, TILES: gl.constexpr, CHOSEN: gl.constexpr, ROW: gl.constexpr,
    HAS: gl.constexpr, FOLDS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Fetch all that a program reads: the part of the warp that loads."""
    q_desc, k_a_desc, v_a_desc, k_b_desc, v_b_desc, k_c_desc, v_c_desc = descriptors
    visits_a, visits_b, visits_c = visits
    first_b, first_c = firsts
    batch, head, pair, t0, y0, x0 = place
    outer = batch if FOLDS[0] else pair
    column = head * D if FOLDS[0] else 0
    mbarrier.expect(bars[0], 2 * HALF[0] * HALF[1] * HALF[2] * D * 2)
    for half in gl.static_range(2):
        at = [outer, t0 + half * STEP[0], y0 + half * STEP[1], x0 + half * STEP[2], column]
        tma.async_copy_global_to_shared(q_desc, at, bars[0], memory[0].index(half))
    if HAS[0]:
        _fetch_segment(
            k_a_desc, v_a_desc, 0, visits_a, 0, ids, corner_ptr, place, memory, bars, TILES[0],
            CHOSEN[0], ROW[0], FOLDS[1], FOLDS[2], STAGES, D,
        )  # fmt: skip
    if HAS[1]:
        _fetch_segment(
            k_b_desc, v_b_desc, visits_a, visits_b, first_b, ids, corner_ptr, place, memory, bars,
            TILES[1], CHOSEN[1], ROW[1], FOLDS[3], FOLDS[4], STAGES, D,
        )  # fmt: skip
    if HAS[2]:
        _fetch_segment(
            k_c_desc, v_c_desc, visits_a + visits_b, visits_c, first_c, ids, corner_ptr, place,
            memory, bars, TILES[2], CHOSEN[2], ROW[2], FOLDS[5], FOLDS[6], STAGES, D,
        )  # fmt: skip


@gluon.jit
def _close(score, extent, TILE: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Hide slots without a token, behind a branch that whole blocks skip."""
    if extent != 0:
        # The sign is 0, which the compiler does not know: it would keep what follows from a slot
        # alone in registers around the loop, and others would be spilled.
        slot = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)) + (extent >> 31)
        exists = (
            (slot // (TILE[1] * TILE[2]) < (extent & 0xFF))
            & (slot // TILE[2] % TILE[1] < ((extent >> 8) & 0xFF))
            & (slot % TILE[2] < ((extent >> 16) & 0xFF))
            & (slot < (extent >> 24))
        )
        score = gl.where(exists[None, :], score, float("-inf"))
    return score


@gluon.jit
def _attend(
    GROUP: gl.constexpr, memory, bars, out_desc, lse_ptr, ids, extent_ptr, visits, scale_log2,
    place, sizes, HALF: gl.constexpr, STEP: gl.constexpr, TILE: gl.constexpr,
    COLUMNS: gl.constexpr, TAILS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    LSE: gl.constexpr,
):  # fmt: skip
    """Attend from 64 queries to all blocks: the part of one group of four warps."""
    q_memory, k_ring, v_ring = memory
    q_full, k_full, v_full, k_empty, v_empty = bars
    batch, head, pair, t0, y0, x0 = place
    q_tokens, q_t, q_y, q_x = sizes
    ROWS: gl.constexpr = HALF[0] * HALF[1] * HALF[2]
    DTYPE: gl.constexpr = q_memory.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)

    q_half = q_memory.index(GROUP)
    q = q_half.reshape([ROWS, D])
    peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
    acc = gl.zeros([ROWS, D], gl.float32, OUT)
    mbarrier.wait(q_full, 0)
    if visits > 0:
        mbarrier.wait(k_full.index(0), 0)
        score = gl.zeros([ROWS, COLUMNS], gl.float32, S)
        keys = k_ring.index(0).permute((1, 0))
        coming = warpgroup_mma(q, keys, score, use_acc=False, is_async=True)
        score = warpgroup_mma_wait(0, deps=[coming])
        mbarrier.arrive(k_empty.index(0), count=1)
        if TAILS:
            score = _close(score, gl.load(extent_ptr + gl.load(ids)), TILE, COLUMNS, S)
        peak = gl.max(score, 1) * scale_log2
        weight = gl.exp2(score * scale_log2 - peak[:, None])
        total = gl.sum(weight, 1)
        weights = gl.convert_layout(weight.to(DTYPE), P)
        mbarrier.wait(k_full.index(1), 0, pred=visits > 1)
        for step in range(1, visits):
            stage = step % STAGES
            before = (step - 1) % STAGES
            if TAILS:
                extent = gl.load(extent_ptr + gl.load(ids + step))
            keys = k_ring.index(stage).permute((1, 0))
            coming = warpgroup_mma(q, keys, score, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
            product = warpgroup_mma(weights, v_ring.index(before), acc, is_async=True)
            score = warpgroup_mma_wait(1, deps=[coming])
            mbarrier.arrive(k_empty.index(stage), count=1)
            if TAILS:
                score = _close(score, extent, TILE, COLUMNS, S)
            # The scale is applied to the maximum of a row and within the multiply-add of the
            # exponent. A visited block has a token, so the peak is finite from the first one on.
            peak_new = gl.maximum(peak, gl.max(score, 1) * scale_log2)
            weight = gl.exp2(score * scale_log2 - peak_new[:, None])
            shrink = gl.exp2(peak - peak_new)
            total = total * shrink + gl.sum(weight, 1)
            peak = peak_new
            # Waiting for the next keys here is a branch, over which the assembler does not move
            # the wait for the product. Without it that wait stood in front of the softmax.
            after = step + 1
            mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, pred=after < visits)
            acc, weight = warpgroup_mma_wait(0, deps=[product, weight])
            mbarrier.arrive(v_empty.index(before), count=1)
            weights = gl.convert_layout(weight.to(DTYPE), P)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
        last = (visits - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((visits - 1) // STAGES) & 1)
        product = warpgroup_mma(weights, v_ring.index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[product])

    share = gl.where(total == 0.0, 1.0, total)
    out = acc / gl.convert_layout(share, gl.SliceLayout(1, OUT))[:, None]
    q.store(out.to(DTYPE))  # its queries have been read, by these warps alone
    fence_async_shared()
    t0 = t0 + GROUP * STEP[0]
    y0 = y0 + GROUP * STEP[1]
    x0 = x0 + GROUP * STEP[2]
    tma.async_copy_shared_to_global(out_desc, [batch, t0, y0, x0, head * D], q_half)
    if LSE:
        slot = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        t = t0 + slot // (HALF[1] * HALF[2])
        y = y0 + slot // HALF[2] % HALF[1]
        x = x0 + slot % HALF[2]
        at = pair.to(gl.int64) * q_tokens + (t * q_y + y) * q_x + x
        lse = gl.where(total == 0.0, float("-inf"), (peak + gl.log2(share)) * 0.6931471805599453)
        gl.store(lse_ptr + at, lse, (t < q_t) & (y < q_y) & (x < q_x))
    tma.store_wait(0)


@gluon.jit
def _count_below(ids, visits, bound):
    """Count the ids of a row that are below a bound."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    found = gl.zeros([128], gl.int32, LAYOUT)
    for start in range(0, visits, 128):
        place = start + gl.arange(0, 128, LAYOUT)
        found += (gl.load(ids + place, mask=place < visits, other=bound) < bound).to(gl.int32)
    return gl.sum(found, 0)


@gluon.jit
def _visits_by_segment(ids, visits, a_blocks, b_blocks, c_blocks, CHOSEN: gl.constexpr):
    """Split a row of ids among the segments, as `triton.visits_by_segment` does."""
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


_PLAIN = ["q_blocks", "width", "q_tokens", "a_blocks", "b_blocks", "c_blocks", "q_t"]


@gluon.jit(do_not_specialize=_PLAIN)
def gluon_kernel(
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
    extent_ptr,
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
    D: gl.constexpr,
    Q_TILE: gl.constexpr,
    A_TILE: gl.constexpr,
    B_TILE: gl.constexpr,
    C_TILE: gl.constexpr,
    ROW: gl.constexpr,
    TAILS: gl.constexpr,
    CHOSEN: gl.constexpr,
    HAS: gl.constexpr,
    FOLDS: gl.constexpr,
    TILE: gl.constexpr,
    HALF: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    LSE: gl.constexpr,
):
    """Attend from one query block to the key blocks of its plan.

    Arguments as those of `tma.tma_kernel`, and `extent_ptr`: which slots of a block hold a token.
    `TILE` is that of the segments that are no rows, `HALF` the box of 64 queries, `STEP` from one
    to the other along each axis, `STAGES` the buffers of a ring.
    """
    COLUMNS: gl.constexpr = A_TILE[0] * A_TILE[1] * A_TILE[2]
    DTYPE: gl.constexpr = q_desc.dtype
    q_block = gl.program_id(0)
    pair = gl.program_id(1)
    n_y = gl.cdiv(q_y, Q_TILE[1])
    n_x = gl.cdiv(q_x, Q_TILE[2])
    t0 = q_block // n_x // n_y * Q_TILE[0]
    y0 = q_block // n_x % n_y * Q_TILE[1]
    x0 = q_block % n_x * Q_TILE[2]
    place = (pair // heads, pair % heads, pair, t0, y0, x0)
    plan = pair.to(gl.int64) * q_blocks + q_block
    visits = gl.load(count_ptr + plan)
    ids = index_ptr + plan * width
    by_segment = _visits_by_segment(ids, visits, a_blocks, b_blocks, c_blocks, CHOSEN)

    RING: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_memory = gl.allocate_shared_memory(
        DTYPE, [2, 1, HALF[0], HALF[1], HALF[2], D], q_desc.layout
    )
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, COLUMNS, D], RING)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, COLUMNS, D], RING)
    memory = (q_memory, k_ring, v_ring)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)  # both groups
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    bars = (q_full, k_full, v_full, k_empty, v_empty)
    keys = (q_desc, k_a_desc, v_a_desc, k_b_desc, v_b_desc, k_c_desc, v_c_desc)
    firsts = (a_blocks, a_blocks + b_blocks)
    sizes = (q_tokens, q_t, q_y, q_x)
    ANY_TAIL: gl.constexpr = TAILS[0] or TAILS[1] or TAILS[2]
    TILES: gl.constexpr = (A_TILE, B_TILE, C_TILE)
    gl.warp_specialize(
        [
            (_attend, (0, memory, bars, out_desc, lse_ptr, ids, extent_ptr, visits, scale_log2,
                       place, sizes, HALF, STEP, TILE, COLUMNS, ANY_TAIL, STAGES, D, LSE)),
            (_attend, (1, memory, bars, out_desc, lse_ptr, ids, extent_ptr, visits, scale_log2,
                       place, sizes, HALF, STEP, TILE, COLUMNS, ANY_TAIL, STAGES, D, LSE)),
            (_fetch, (keys, by_segment, firsts, ids, corner_ptr, place, memory, bars, HALF, STEP,
                      TILES, CHOSEN, ROW, HAS, FOLDS, STAGES, D)),
        ],
        [4, 1],
        [240, 24],  # registers of a thread; what is left, 240, is that of the first group
    )  # fmt: skip
