"""Attend with torch's FlexAttention, whose blocks are runs of tokens: those of a tile order.

It is asked for by name, once `prepare` has compiled it and seen that it visits listed blocks only:
FlexAttention takes a list of blocks as a hint, and some of its forms drop it. Which pairs count is
said once more by the mask, so that a dropped list would cost time and change nothing.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels.block_sparse.kind import Kind
from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout
from lipass.kernels.token_major import token_major

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the problem on which it is tried: blocks, and slots of each.
_BLOCKS, _SLOTS = 4, 128

_ready: dict[str, str] = {}
"""Type of device to why it cannot be used there; nothing where it can."""


def why_not(kind: Kind) -> str | None:
    """Refuse other dtypes, gradients, and everything until it has been prepared."""
    if kind.dtype not in DTYPES:
        return f"computes in fp32, bf16 and fp16, got {kind.dtype}"
    if kind.records:
        return "has no backward for blocks that are chosen, and q, k, v or a bias requires one"
    if kind.device.type not in _ready:
        return "not compiled yet; call lipass.kernels.block_sparse.flex.prepare()"
    return _ready[kind.device.type] or None


def lay(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    q_grid: BlockGrid,
    kv: KvLayout,
    biased: bool,
) -> str | None:
    """Refuse blocks that are no runs of tokens, and biases."""
    if biased:
        return "takes no bias and no mask of keys"
    grids = {"queries": q_grid} | {part.role: part.grid for part in kv.segments}
    for name, grid in grids.items():
        if not _in_runs(grid):
            return (
                f"takes blocks that are runs of tokens, got tiles {grid.tile} of {name}; "
                "sparse.tile_order puts them in order"
            )
    return None


def _in_runs(grid: BlockGrid) -> bool:
    apart = [n for n in range(3) if (grid.grid[n], grid.tile[n]) != (1, 1)]
    return len(apart) <= 1


def prepare(device: torch.device | str = "cpu") -> str:
    """Compile and try it on a device; return why it cannot be used there, or nothing."""
    device = torch.device(device)
    if device.type not in _ready:
        try:
            _ready[device.type] = _dropped(device)
        except Exception as error:  # whatever a compiler raises, it is no provider
            said = str(error).strip().partition("\n")[0]
            _ready[device.type] = f"does not run here: {said}"
    return _ready[device.type]


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
    """Attend; see `lipass.kernels.block_sparse.api`.

    Segments are joined, each filled up to whole blocks; one alone stays where it lies.
    """
    assert key_bias is None
    assert plan.key_keep is None
    slots, lengths = plan.kv.block_tokens, plan.segment_tokens
    exists = torch.cat([_whole(torch.ones(n, dtype=torch.bool), 0, slots) for n in lengths])
    full = exists.view(-1, slots).all(1).to(q.device)
    k, v = (
        torch.cat([_whole(x, 2, slots) for x in parts], 2) if len(parts) > 1 else parts[0]
        for parts in (keys, values)
    )
    visited, exists = plan.visited(), exists[: k.shape[2]].to(q.device)
    volumes = plan.q_grid.block_tokens, slots

    def counts(b: Tensor, h: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        return visited[b, h, q_at // volumes[0], k_at // volumes[1]] & exists[k_at]

    blocks = _mask(visited & ~full, visited & full, volumes, (q.shape[2], len(exists)), counts)
    if not return_lse:
        return token_major(_compiled()(q, k, v, block_mask=blocks, scale=scale)), None
    out, lse = _with_log_sums(q, k, v, blocks, scale)
    return token_major(out), lse


def _with_log_sums(
    q: Tensor, k: Tensor, v: Tensor, blocks: Any, scale: float
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    # Compiled for a CPU it gives none; as it is written it computes every pair of the mask.
    attend = flex_attention if q.device.type == "cpu" else _compiled()
    out, aux = attend(q, k, v, block_mask=blocks, scale=scale, return_aux=AuxRequest(lse=True))
    return out, aux.lse


def _whole(x: Tensor, dim: int, slots: int) -> Tensor:
    """Fill an axis up to a multiple of the slots of a block, with zeros or False."""
    missing = -x.shape[dim] % slots
    return F.pad(x, (0, 0) * (x.dim() - dim - 1) + (0, missing)) if missing else x


def _mask(
    partial: Tensor, full: Tensor, volumes: tuple[int, int], lengths: tuple[int, int], counts: Any
) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask.from_kv_blocks(
        *_lists(partial),
        *_lists(full),
        BLOCK_SIZE=volumes,
        mask_mod=counts,
        seq_lengths=lengths,
        compute_q_blocks=False,
    )


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Count the blocks of each row of a mask, and name them in front of the others."""
    order = mask.int().argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1).int(), order.int().contiguous()


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _dropped(device: torch.device) -> str:
    """Say that blocks which no list names are visited, or nothing.

    The mask lets every pair through and is not of a form that is simplified away, so that lists
    alone leave blocks out.
    """
    tokens = _BLOCKS * _SLOTS
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    drawn = torch.randn(3, 1, 1, tokens, 64, generator=generator, dtype=torch.float32)
    q, k, v = drawn.to(device, dtype).unbind(0)
    listed = torch.ones(1, 1, _BLOCKS, _BLOCKS, dtype=torch.bool, device=device).tril()
    every = torch.ones(tokens, dtype=torch.bool, device=device)
    blocks = _mask(
        torch.zeros_like(listed), listed, (_SLOTS, _SLOTS), (tokens, tokens),
        lambda b, h, q_at, k_at: every[k_at],
    )  # fmt: skip
    with torch.no_grad():
        out = _compiled()(q, k, v, block_mask=blocks)
    pairs = listed.repeat_interleave(_SLOTS, 2).repeat_interleave(_SLOTS, 3)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=pairs)
    off = float((out.float() - expected).abs().max())
    return (
        "" if math.isfinite(off) and off < 0.05 else "drops the lists of blocks that it is given"
    )
