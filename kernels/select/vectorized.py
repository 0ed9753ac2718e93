"""Select with whole-tensor operations, on any device, without reading one back."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lipass.kernels.plan import BlockGrid, KvLayout

# Below this, budget * blocks counts as the integer that it was meant to be (0.1 * 30 > 3 in fp64).
_ROUNDING = 1e-6


class Rule(NamedTuple):
    """What follows from shapes and options alone, whatever the tensors hold."""

    candidates: range
    grid: BlockGrid
    protected: Tensor | None  # [Nq or 1, Nc] bool
    own: Tensor | None  # [Nq, Nc] bool, candidates inside a query block (prefill)
    wanted: int
    before: Tensor  # ids of the blocks in front of the candidates, int32
    after: Tensor


def why_not(
    q_mean: Tensor, k_mean: Tensor, keep_frames: Tensor | None, seen: Tensor | None = None
) -> str | None:
    """Refuse nothing: any means, mask and device will do."""
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

    The scores are ranked only, so their scale does not enter.
    """
    batch, heads, q_blocks, _ = q_mean.shape
    fixed = rule_of(layout, q_grid, budget, role, sink_latents, q_mean.device)
    candidates, wanted = len(fixed.candidates), fixed.wanted
    width = fixed.before.numel() + wanted + fixed.after.numel()
    counts = torch.full((batch, heads, q_blocks), width, dtype=torch.int32, device=q_mean.device)
    if wanted == candidates and keep_frames is None and seen is None:
        every = torch.arange(layout.blocks, dtype=torch.int32, device=q_mean.device)
        return every.expand(batch, heads, q_blocks, -1), counts

    score = q_mean @ k_mean.mT  # [B, H, Nq, Nc]
    score = score.nan_to_num(nan=torch.finfo(score.dtype).min)
    if fixed.protected is not None:
        score = score.masked_fill(fixed.protected, math.inf)
    if keep_frames is not None:
        return _among_kept(score, fixed, layout, budget, keep_frames)
    if seen is not None:
        return _among_seen(score, fixed, layout, budget, seen)
    best = score.topk(wanted, sorted=False).indices.sort().values.int() + fixed.candidates.start
    shape = (batch, heads, q_blocks, -1)
    return torch.cat([fixed.before.expand(shape), best, fixed.after.expand(shape)], -1), counts


@functools.lru_cache(maxsize=512)
def selected_blocks(
    layout: KvLayout, q_grid: BlockGrid, budget: float, role: str, sink_latents: int
) -> int:
    """Blocks that each query block visits where no frame is dropped, `S`; known on the host."""
    fixed = rule_of(layout, q_grid, budget, role, sink_latents, torch.device("cpu"))
    return layout.blocks - len(fixed.candidates) + fixed.wanted


def _among_kept(
    score: Tensor,
    fixed: Rule,
    layout: KvLayout,
    budget: float,
    keep_frames: Tensor,
) -> tuple[Tensor, Tensor]:
    batch, heads, q_blocks, _ = score.shape
    kept = fixed.grid.blocks_with(keep_frames)[:, None, None]  # [B, 1, 1, Nc]
    protected = torch.zeros_like(kept) if fixed.protected is None else fixed.protected & kept
    spared = protected.sum(-1)
    wanted = spared + ((kept.sum(-1) - spared) * budget - _ROUNDING).ceil().clamp(min=0).long()
    if fixed.own is None:
        wanted = wanted.amax(-1, keepdim=True).expand(batch, 1, q_blocks)
    else:
        # A query block without a kept frame visits itself, so that its rows stay finite.
        dead = ~(fixed.own & kept).any(-1)  # [B, 1, Nq]
        wanted = wanted.masked_fill(dead, 0).amax(-1, keepdim=True)
        wanted = torch.where(dead, fixed.own.sum(-1), wanted)
        itself = torch.where(fixed.own, math.inf, -math.inf)
        kept, score = kept | dead[..., None], torch.where(dead[..., None], itself, score)
    score = score.masked_fill(~kept, -math.inf)

    best = score.topk(fixed.wanted).indices + fixed.candidates.start
    rank = torch.arange(fixed.wanted, device=score.device)
    # Entries past the count sort behind every block id and turn into -1.
    best = torch.where(rank < wanted[..., None], best, layout.blocks).int()
    shape = (batch, heads, q_blocks, -1)
    parts = [fixed.before.expand(shape), best, fixed.after.expand(shape)]
    indices = torch.cat(parts, -1).sort().values
    always = fixed.before.numel() + fixed.after.numel()
    counts = (wanted + always).int().expand(batch, heads, q_blocks)
    return torch.where(indices == layout.blocks, -1, indices), counts.contiguous()


def _among_seen(
    score: Tensor, fixed: Rule, layout: KvLayout, budget: float, seen: Tensor
) -> tuple[Tensor, Tensor]:
    batch, heads, q_blocks, _ = score.shape
    span, shape = fixed.candidates, (batch, heads, q_blocks, -1)
    open_to = seen[:, None, :, span.start : span.stop]  # [B or 1, 1, Nq, Nc]
    spared = open_to.new_zeros((), dtype=torch.int64)
    if fixed.protected is not None:
        spared = (fixed.protected & open_to).sum(-1)
    rest = open_to.sum(-1) - spared
    wanted = spared + (rest * budget - _ROUNDING).ceil().clamp(min=0).long()
    best = score.masked_fill(~open_to, -math.inf).topk(fixed.wanted).indices + span.start
    # Entries past the count sort behind every block id and turn into -1.
    rank = torch.arange(fixed.wanted, device=score.device)
    best = torch.where(rank < wanted[..., None], best, layout.blocks).int()
    parts = [best]
    for others in (fixed.before, fixed.after):
        visible = seen[:, None, :, others.long()]
        parts.append(torch.where(visible, others, layout.blocks).int().expand(shape))
    indices = torch.cat(parts, -1).sort().values
    counts = (indices != layout.blocks).sum(-1).int()
    return torch.where(indices == layout.blocks, -1, indices), counts


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def rule_of(
    layout: KvLayout,
    q_grid: BlockGrid,
    budget: float,
    role: str,
    sink_latents: int,
    device: torch.device,
) -> Rule:
    """Tabulate what does not depend on the tensors; built on the host, moved once."""
    segment = layout.candidate_segment(role)
    grid = BlockGrid((0, 0, 0), q_grid.tile) if segment is None else layout.segments[segment].grid
    span = range(0) if segment is None else layout.block_range(segment)
    protected = grid.first_latents(sink_latents)[None]
    own = q_grid.covers(grid) if role != "decode" else None
    if own is not None:
        protected = protected | ((own.float() @ grid.neighbours().float()) > 0)
    spared = protected.sum(-1).tolist()  # sync-ok: a host table, built once a grid
    wanted = max(
        (n + math.ceil(budget * (grid.blocks - n) - _ROUNDING) for n in spared), default=0
    )
    ids = torch.arange(layout.blocks, dtype=torch.int32)
    return Rule(
        candidates=span,
        grid=grid,
        protected=protected.to(device) if any(spared) else None,
        own=None if own is None else own.to(device),
        wanted=wanted,
        before=ids[: span.start].to(device),
        after=ids[span.stop :].to(device),
    )
