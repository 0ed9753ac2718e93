"""Check the arguments of block selection and send the call to a provider."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lipass.kernels import registry
from lipass.kernels.plan import CALL_ROLES, BlockGrid, KvLayout
from lipass.kernels.select.vectorized import selected_blocks

__all__ = ["select_blocks", "selected_blocks"]


def select_blocks(
    q_mean: Tensor,
    k_mean: Tensor,
    layout: KvLayout,
    q_grid: BlockGrid,
    *,
    budget: float,
    scale: float,
    role: str,
    sink_latents: int,
    keep_frames: Tensor | None = None,
    seen: Tensor | None = None,
    provider: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the key blocks that each query block visits.

    The candidates are the history blocks (`role="decode"`) or the current blocks (`"prefill"`,
    `"self"`, which are one rule); all other segments are visited whole. Of the candidates, blocks
    with a sink frame and, in prefill, blocks at most one tile away are protected; of the rest the
    best `ceil(budget * rest)` by `q_mean . k_mean` join them. Every query block visits the same
    number of blocks, the largest that any of them asks for, so that no row is padded. Candidates
    without a kept frame are absent; in prefill a query block without one visits itself and the
    other segments. Where `seen` says which blocks a query block may visit, the rule holds among
    those, for each query block by itself. Infinite scores count as the largest or lowest fp32
    number and NaN as the lowest, so that protected blocks stay, absent ones stay out, and a row is
    ascending whatever it ranks.

    Source: arXiv 2605.31158, section on AR-aware sparse attention. Differs in: the sink is
    protected, neighbours come on top of the budget, means never count padding.

    Args:
        q_mean: query block means `[B, H, Nq, D]` fp32.
        k_mean: means of the candidate blocks `[B, H, Nc, D]` fp32.
        layout: the key segments.
        q_grid: grid of the queries. In prefill that of the current segment; its tile may be a
            multiple of the key tile, in decode it may be any.
        budget: share of the unprotected candidates to visit, in `(0, 1]`.
        scale: softmax scale; positive, so it does not change the ranking.
        role: one of `CALL_ROLES`.
        sink_latents: how many of the first candidate frames are always visited.
        keep_frames: `[B, T]` bool over the candidate frames, or None to keep all.
        seen: `[B or 1, Nq, Nk]` bool, which blocks of all segments a query block may visit; all by
            default, and without `keep_frames`.
        provider: implementation to use; by default the best that takes the call.

    Returns:
        Block ids `[B, H, Nq, S]` int32, ascending, `-1` past the counts, and the counts
        `[B, H, Nq]` int32.

    Raises:
        ValueError: if an argument is out of range or does not fit the layout, or the provider
            refuses.
    """
    if not torch.compiler.is_compiling():
        reason = _unfit(q_mean, k_mean, layout, q_grid, budget, scale, role, keep_frames)
        reason = reason or _unfit_seen(seen, q_mean, layout, keep_frames)
        if reason:
            raise ValueError(reason)
    chosen = registry.choose(
        "select",
        q_mean.device,
        provider,
        lambda module: module.why_not(q_mean, k_mean, keep_frames, seen),
    )
    return chosen.module.select_blocks(
        q_mean,
        k_mean,
        layout,
        q_grid,
        budget=budget,
        role=role,
        sink_latents=sink_latents,
        keep_frames=keep_frames,
        seen=seen,
    )


def _unfit_seen(
    seen: Tensor | None, q_mean: Tensor, layout: KvLayout, keep_frames: Tensor | None
) -> str | None:
    if seen is None:
        return None
    if keep_frames is not None:
        return "seen must come without keep_frames, got both; hide dropped frames in seen"
    batch, blocks = q_mean.shape[0], (q_mean.shape[2], layout.blocks)
    if seen.dim() == 3 and seen.shape[0] in (1, batch) and seen.shape[1:] == blocks:
        return None
    return (
        f"seen must be [B or 1, Nq, Nk] with B, Nq, Nk = {batch}, {blocks[0]}, {blocks[1]}, got "
        f"{list(seen.shape)}; number the blocks over all segments"
    )


def _unfit(
    q_mean: Tensor,
    k_mean: Tensor,
    layout: KvLayout,
    q_grid: BlockGrid,
    budget: float,
    scale: float,
    role: str,
    keep_frames: Tensor | None,
) -> str | None:
    """Name the first rule that a call breaks."""
    reason = _bad_options(layout, q_grid, budget, scale, role)
    if reason:
        return reason
    segment = layout.candidate_segment(role)
    frames = 0 if segment is None else layout.segments[segment].grid.grid[0]
    blocks = 0 if segment is None else layout.segments[segment].grid.blocks
    if q_mean.shape[2] != q_grid.blocks or k_mean.shape[2] != blocks:
        return (
            f"means must cover {q_grid.blocks} query and {blocks} candidate blocks, got "
            f"{q_mean.shape[2]} and {k_mean.shape[2]}; pool them with the same grids"
        )
    if keep_frames is not None and keep_frames.shape != (q_mean.shape[0], frames):
        return (
            f"keep_frames must be [B, T] = [{q_mean.shape[0]}, {frames}], got "
            f"{list(keep_frames.shape)}; it covers the history in decode, the current in prefill"
        )
    return None


def check_options(
    layout: KvLayout, q_grid: BlockGrid, budget: float, scale: float, role: str
) -> None:
    """Check what does not depend on tensors.

    Raises:
        ValueError: if an option is out of range or does not fit the layout.
    """
    reason = _bad_options(layout, q_grid, budget, scale, role)
    if reason:
        raise ValueError(reason)


@functools.lru_cache(maxsize=512)
def _bad_options(
    layout: KvLayout, q_grid: BlockGrid, budget: float, scale: float, role: str
) -> str | None:
    if not 0.0 < budget <= 1.0:
        return f"budget must be in (0, 1], got {budget}; 1.0 visits every block"
    if scale <= 0.0:
        return f"scale must be positive, got {scale}; the default is D ** -0.5"
    if role not in CALL_ROLES:
        return f"role must be one of {', '.join(CALL_ROLES)}, got {role!r}; leave the rest dense"
    segment = layout.candidate_segment(role)
    if role != "decode" and (segment is None or layout.segments[segment].grid.grid != q_grid.grid):
        return f"in {role} the current keys must have the grid of the queries, {q_grid.grid}"
    return None
