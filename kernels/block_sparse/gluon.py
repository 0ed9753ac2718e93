"""Attend on Hopper by a kernel whose warps specialise (`gluon_kernel.py`), once a probe passed.

Tensors are described as for the kernel in `tma.py`, but for queries and output, which are halves
of a tile: each of two groups of warps has one. Tests compile the kernel and follow its steps on
the host, but it has not run on a GPU: it takes no call before a probe in a process of its own has
passed there (`lipass.kernels.probe`), and is asked first only where it was measured to be fastest.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lipass.kernels import chip, probe
from lipass.kernels.block_sparse import tma
from lipass.kernels.block_sparse.gluon_kernel import gluon_kernel
from lipass.kernels.block_sparse.kind import Kind
from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout, Triple
from lipass.kernels.token_major import empty_token_major

TILE_VOLUME = 128
_CAPABILITY = (9, 0)
_LOG2_E = math.log2(math.e)
# Keys and values that are held at once, of a shared memory of 227 KiB that holds queries too.
_RING_BYTES = 128 << 10
# How tiles lie in shared memory: 64 numbers of a row together, as the products want them.
_BOX = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)
# No row has so many tokens along an axis that the first 8 bits say otherwise.
_ALL = 127


def why_not(kind: Kind) -> str | None:
    """Give the reason why the kernel cannot take a call, or None."""
    return unfit(kind) or probe.why_not("gluon", kind)


@functools.lru_cache(maxsize=512)
def unfit(kind: Kind) -> str | None:
    """Give the reason why it could not, whatever a probe has said."""
    if why := chip.why_not(kind.device):
        return why
    if chip.INTERPRETED:
        return "is compiled only; Triton's interpreter does not run Gluon"
    if (found := chip.capability(kind.device)) != _CAPABILITY:
        return f"needs a chip of compute capability 9.0, got {found[0]}.{found[1]}"
    if kind.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, got {kind.dtype}"
    if kind.dim not in tma.HEAD_DIMS:
        return f"takes head dims {tma.HEAD_DIMS}, got {kind.dim}"
    volumes = (kind.q_volume, kind.k_volume)
    if volumes != (TILE_VOLUME, TILE_VOLUME):
        return f"takes tiles of {TILE_VOLUME} slots, got {volumes[0]} queries, {volumes[1]} keys"
    if kind.records:
        return "has no backward, and q, k, v or a bias requires one"
    return None


def lay(
    q: Tensor, keys: list[Tensor], values: list[Tensor], q_grid: BlockGrid, kv: KvLayout,
    biased: bool,
) -> tma.Laid | str:  # fmt: skip
    """Describe tensors to the TMA unit; see `tma.lay`."""
    if why := tma.unfit_tensors(q, keys, values, biased):
        return why
    strides = tuple([x.stride() for x in (*keys, *values)])
    return _describe(q.shape, q.dtype, q.stride(), strides, q_grid, kv)


def block_sparse_attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    plan: BlockPlan,
    *,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool = False,
    laid: tma.Laid | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend; see `lipass.kernels.block_sparse.api`. `laid` is what `lay` said of the tensors."""
    assert key_bias is None
    assert plan.key_keep is None
    batch, heads, tokens, dim = q.shape
    made = tma.geometry(plan.q_grid, plan.kv, plan.shared_segments, q.device)
    if laid is None:
        found = lay(q, keys, values, plan.q_grid, plan.kv, False)
        assert isinstance(found, tma.Laid)
        laid = found
    out = empty_token_major(q)
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32) if return_lse else plan.counts
    descriptors = tma.described(laid, q, out, keys, values, plan.kv)
    indices, counts = plan.indices.contiguous(), plan.counts.contiguous()
    with chip.launching_on(q.device):
        gluon_kernel[plan.q_grid.blocks, batch * heads](
            *descriptors,
            lse,
            indices,
            counts,
            made.corners,
            extents(plan.kv, q.device),
            scale * _LOG2_E,
            heads,
            plan.q_grid.blocks,
            indices.shape[-1],
            tokens,
            *made.numbers[:6],
            D=dim,
            FOLDS=laid.folds,
            LSE=return_lse,
            STAGES=stages(dim),
            **made.constants,
            **constants(plan.q_grid, plan.kv),
            num_warps=4,
        )
    tma.give_back(laid, descriptors)
    return out, lse if return_lse else None


def stages(dim: int) -> int:
    """Say how many buffers of keys, and of values, fit into shared memory."""
    return _RING_BYTES // (2 * TILE_VOLUME * dim * 2)


@functools.lru_cache(maxsize=512)
def constants(q_grid: BlockGrid, kv: KvLayout) -> dict[str, Any]:
    """Say what the compiler knows beside what `tma.geometry` says of grids."""
    half, step = _halves(q_grid.tile)
    return {"TILE": _tile(kv), "HALF": half, "STEP": step}


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def extents(kv: KvLayout, device: torch.device) -> Tensor:
    """Say which slots of a block hold a token, `[Nk]` int32: 0 where all do.

    Otherwise `slots << 24 | x << 16 | y << 8 | t`: those whose place in the tile is below all
    three, and that are among the first slots. The last slot of such a block never is, so each of
    the numbers has 7 bits.
    """
    found = [_extents(part.grid) for part in kv.segments if part.grid.blocks]
    return torch.cat(found or [torch.zeros(1).int()]).to(device)


def _extents(grid: BlockGrid) -> Tensor:
    held = grid.lengths("cpu")
    if grid.is_row:
        fields = [held, *[torch.full_like(held, _ALL)] * 3]
    else:
        block, (_, n_y, n_x) = torch.arange(grid.blocks, device="cpu"), grid.block_shape
        at = (block // (n_y * n_x), block // n_x % n_y, block % n_x)
        t, y, x = (
            (size - place * step).clamp(max=min(step, _ALL))
            for place, size, step in zip(at, grid.grid, grid.tile, strict=True)
        )
        fields = [torch.full_like(held, _ALL), x, y, t]
    slots, x, y, t = fields
    packed = slots << 24 | x << 16 | y << 8 | t
    return torch.where(held == grid.block_tokens, 0, packed).int()


def _tile(kv: KvLayout) -> Triple:
    """Return the tile of the segments that are no rows; any where all are."""
    tiles = [part.grid.tile for part in kv.segments if part.grid.blocks and not part.grid.is_row]
    return tiles[0] if tiles else (1, 1, kv.block_tokens)


def _halves(tile: Triple) -> tuple[Triple, Triple]:
    """Cut a tile in two boxes of consecutive slots; give one, and the way to the other."""
    axis = next(n for n in range(3) if tile[n] > 1)
    half = [size // 2 if n == axis else size for n, size in enumerate(tile)]
    step = [half[n] if n == axis else 0 for n in range(3)]
    return (half[0], half[1], half[2]), (step[0], step[1], step[2])


@functools.lru_cache(maxsize=1024)
def _describe(
    q_shape: torch.Size,
    dtype: torch.dtype,
    q_stride: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    q_grid: BlockGrid,
    kv: KvLayout,
) -> tma.Laid | str:
    found = tma.describe(q_shape, dtype, q_stride, strides, q_grid, kv)
    if isinstance(found, str):
        return found
    tiles = {part.grid.tile for part in kv.segments if part.grid.blocks and not part.grid.is_row}
    if len(tiles) > 1:
        return f"takes one tile for all segments but rows, got {sorted(tiles)}"
    box = [1, *_halves(q_grid.tile)[0], q_shape[3]]
    boxes = [box, box, *(fields["block_shape"] for fields in found.fields[2:])]
    empty = torch.empty(0, dtype=dtype, device="cpu")
    fields = []
    for one, block in zip(found.fields, boxes, strict=True):
        made = vars(TensorDescriptor(empty, one["shape"], one["strides"], block, _BOX))
        fields.append({name: field for name, field in made.items() if name != "base"})
    return found._replace(fields=fields, made_of=TensorDescriptor, spare=[])
