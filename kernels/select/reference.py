"""Define block selection, one query block at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipass.kernels.plan import BlockGrid, KvLayout


def why_not(
    q_mean: Tensor, k_mean: Tensor, keep_frames: Tensor | None, seen: Tensor | None = None
) -> str | None:
    """Refuse nothing: the definition covers every call."""
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
    """Choose key blocks for each query block; `lipass.kernels.select.api` states the contract.

    ```text
    candidates = history blocks (decode) or current blocks (prefill, self)
    protected  = blocks with a sink frame; in the latter also blocks one tile away or less
    wanted(q)  = |protected(q)| + ceil(budget * |candidates - protected(q)|)
    visit(q)   = all other segments + protected(q) + the best scores up to max over q of wanted
    ```

    Blocks that a query block may not see are absent from both, and `wanted` is then its own.
    Blocks without a kept frame are no candidates. A query block without one visits itself.
    The scale of the scores is positive and does not change their order, so it does not enter.
    `near` is one tile away or less, counted in key tiles from any key tile of the query block.
    """
    batch, heads, q_blocks, _ = q_mean.shape
    found = layout.candidate_segment(role)
    candidates = range(0) if found is None else layout.block_range(found)
    always = [block for block in range(layout.blocks) if block not in candidates]
    grid = BlockGrid((0, 0, 0), q_grid.tile) if found is None else layout.segments[found].grid
    own, near = torch.zeros(2, q_blocks, grid.blocks, dtype=torch.bool)
    if role != "decode":
        own = q_grid.covers(grid)
        near = torch.stack([grid.neighbours()[mine].any(0) for mine in own])
    sink = grid.first_latents(sink_latents)

    chosen: list[list[int]] = []
    for b in range(batch):
        alive = torch.ones(q_blocks, grid.blocks, dtype=torch.bool)
        if keep_frames is not None:
            alive &= grid.blocks_with(keep_frames.cpu())[b]
        shown = torch.ones(q_blocks, layout.blocks, dtype=torch.bool)
        if seen is not None:
            shown = seen.cpu()[b % seen.shape[0]]
            alive &= shown[:, candidates.start : candidates.stop]
        asks = [q for q in range(q_blocks) if role == "decode" or bool(alive[q][own[q]].any())]
        wanted = [0] * q_blocks
        for q in range(q_blocks):
            protected = int(((near[q] | sink) & alive[q]).sum())
            rest = int(alive[q].sum()) - protected
            wanted[q] = protected + math.ceil(budget * rest - 1e-6)
        if seen is None:
            wanted = [max((wanted[q] for q in asks), default=0)] * q_blocks
        for h in range(heads):
            score = (q_mean[b, h].float() @ k_mean[b, h].float().mT).cpu()
            score = score.nan_to_num(nan=torch.finfo(torch.float32).min)
            for q in range(q_blocks):
                others = [block for block in always if shown[q, block]]
                if seen is None and q not in asks:
                    itself = [candidates[k] for k in own[q].nonzero()[:, 0].tolist()]
                    chosen.append(sorted([*others, *itself]))
                    continue
                rank = score[q].masked_fill(near[q] | sink, math.inf)
                rank = rank.masked_fill(~alive[q], -math.inf)
                best = rank.argsort(descending=True, stable=True)[: wanted[q]].tolist()
                chosen.append(sorted([*others, *(candidates[k] for k in best)]))

    width = max((len(row) for row in chosen), default=0)
    padded = [row + [-1] * (width - len(row)) for row in chosen]
    shape = (batch, heads, q_blocks)
    indices = torch.tensor(padded, dtype=torch.int32, device=q_mean.device)
    counts = torch.tensor([len(row) for row in chosen], dtype=torch.int32, device=q_mean.device)
    return indices.view(*shape, width), counts.view(shape)
