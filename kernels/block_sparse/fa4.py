"""Attend with FlashAttention 4, where its package is installed and blocks are runs of tokens.

Its interface is that of `flash_attn.cute` as of August 2026: lists of blocks of 128 keys for each
128 queries, tensors `[B, L, H, D]`, a log-sum-exp of base e. Keys behind the end are hidden in the
last block of a list alone; so of the segments, which are joined, one may end in a block that is
not whole, and it goes last. It has not run with this project: it takes no call before a probe has
passed, and is asked only where it was measured.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import flash_attn_func
from torch import Tensor

from lipass.kernels import chip, probe
from lipass.kernels.block_sparse.kind import Kind
from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout

BLOCK = 128
_CAPABILITY = (9, 0)
_DIM_MAX, _DIM_STEP = 128, 8
_ASKED = ("softmax_scale", "block_sparse_tensors", "return_lse")


def why_not(kind: Kind) -> str | None:
    """Give the reason why it cannot take a call, or None."""
    return unfit(kind) or probe.why_not("fa4", kind)


def unfit(kind: Kind) -> str | None:
    """Give the reason why it could not, whatever a probe has said."""
    if why := chip.why_not(kind.device):
        return why
    if missing := _missing(flash_attn_func):
        return f"needs a flash_attn.cute that takes {missing}; install a newer one"
    if (found := chip.capability(kind.device)) != _CAPABILITY:
        # On Blackwell its query blocks have 256 rows.
        return f"takes blocks of {BLOCK} queries on 9.0 only, got {found[0]}.{found[1]}"
    if kind.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, got {kind.dtype}"
    if kind.dim > _DIM_MAX or kind.dim % _DIM_STEP:
        return f"takes head dims up to {_DIM_MAX}, multiples of {_DIM_STEP}, got {kind.dim}"
    if (kind.q_volume, kind.k_volume) != (BLOCK, BLOCK):
        return f"takes blocks of {BLOCK}, got {kind.q_volume} queries, {kind.k_volume} keys"
    if kind.records:
        return "is called without its backward, and q, k, v or a bias requires one"
    return None


@functools.lru_cache(maxsize=4)
def _missing(function: Callable[..., object]) -> str:
    """Name what a function of the package does not take; older versions know no lists."""
    known = inspect.signature(function).parameters
    return ", ".join(name for name in _ASKED if name not in known)


def lay(
    q: Tensor, keys: list[Tensor], values: list[Tensor], q_grid: BlockGrid, kv: KvLayout,
    biased: bool,
) -> str | None:  # fmt: skip
    """Refuse blocks that are no runs of tokens, biases, and segments that it cannot end."""
    if biased:
        return "takes no bias and no mask of keys"
    if not (kv.in_runs and q_grid.laid.is_row):
        return "takes blocks that are runs of tokens; sparse.tile_order puts them in order"
    tails = [part.role for part in kv.segments if not part.grid.is_full]
    if len(tails) > 1:
        return (
            f"hides keys behind the end of one segment, got blocks that are not whole in "
            f"{' and '.join(tails)}"
        )
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
    assert key_bias is None
    assert plan.key_keep is None
    order = _order(plan.kv)
    k, v = (_joined(parts, plan.kv, order) for parts in (keys, values))
    none = torch.zeros_like(plan.counts)
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=none,
        mask_block_idx=none[..., None],
        full_block_cnt=plan.counts.contiguous(),
        full_block_idx=_lists(plan, order),
        block_size=(BLOCK, BLOCK),
    )
    with chip.launching_on(q.device):
        out, lse = flash_attn_func(
            q.transpose(1, 2), k, v, softmax_scale=scale, block_sparse_tensors=blocks,
            return_lse=return_lse,
        )  # fmt: skip
    return out.transpose(1, 2), lse if return_lse else None


@functools.lru_cache(maxsize=512)
def _order(kv: KvLayout) -> tuple[int, ...]:
    """Number the segments as they are joined: the one whose last block is not whole goes last."""
    numbers = range(len(kv.segments))
    return tuple(sorted(numbers, key=lambda n: not kv.segments[n].grid.is_full))


def _joined(parts: list[Tensor], kv: KvLayout, order: tuple[int, ...]) -> Tensor:
    """Join segments along the tokens, `[B, L, H, D]`."""
    if len(parts) == 1 and order != tuple(range(len(order))):
        parts = list(parts[0].split(kv.segment_tokens, 2))
    if len(parts) > 1:
        parts = [parts[n] for n in order]
        return torch.cat([part.transpose(1, 2) for part in parts], 1)
    return parts[0].transpose(1, 2)


def _lists(plan: BlockPlan, order: tuple[int, ...]) -> Tensor:
    """Name the blocks of each row as they are joined, ascending, `[B, H, Nq, Nk]` int32."""
    ids, blocks = plan.indices, plan.kv.blocks
    if order != tuple(range(len(order))):
        place = _places(plan.kv, order, ids.device)
        ids = torch.where(ids < 0, blocks, place[ids.clamp(min=0).long()]).sort(-1).values
    return torch.nn.functional.pad(ids.clamp(0, max(blocks - 1, 0)), (0, blocks - ids.shape[-1]))


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _places(kv: KvLayout, order: tuple[int, ...], device: torch.device) -> Tensor:
    """Say where each block is once segments are joined, `[Nk]` int32."""
    ids = torch.cat([torch.tensor(kv.block_range(n), dtype=torch.int64) for n in order])
    places = torch.empty_like(ids).scatter(0, ids, torch.arange(len(ids)))
    return places.int().to(device)
