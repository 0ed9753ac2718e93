"""Turn queries and keys into a block plan: pool, select, mask."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lipass.kernels import chip, registry
from lipass.kernels.autocast import in_given_dtypes
from lipass.kernels.block_sparse import native
from lipass.kernels.block_sparse.api import unfit_heads
from lipass.kernels.given import GivenBlocks, plan_as_given, unfit_blocks
from lipass.kernels.latent_mask import seen_blocks
from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout
from lipass.kernels.pool.api import pool_blocks
from lipass.kernels.select.api import check_options, select_blocks
from lipass.kernels.select.vectorized import rule_of

PLANNERS = ("mean", "cosine", "given")
"""Who may choose blocks: products or cosines of the means of queries and keys, or the caller."""


@in_given_dtypes
def plan_attention(
    q: Tensor,
    keys: list[Tensor],
    layout: KvLayout,
    q_grid: BlockGrid,
    *,
    budget: float,
    scale: float,
    role: str,
    sink_latents: int,
    keep_frames: Tensor | None = None,
    candidate_means: Tensor | None = None,
    planner: str = "mean",
    given: GivenBlocks | None = None,
    latent_mask: Tensor | None = None,
    checked: bool = False,
) -> BlockPlan:
    """Choose what each query block visits; arguments as in `select_blocks`.

    Args:
        q: queries `[B, H, Lq, D]`.
        keys: one tensor `[B, H, L, D]` per segment of the layout.
        layout: the key segments.
        q_grid: grid of the queries.
        budget: share of the unprotected candidate blocks to visit, in `(0, 1]`.
        scale: softmax scale.
        role: one of `lipass.kernels.plan.CALL_ROLES`.
        sink_latents: how many of the first candidate frames are always visited.
        keep_frames: `[B, T]` bool over the candidate frames, or None to keep all.
        candidate_means: means of the candidate blocks `[B, H, Nc, D]` fp32 as `pool_blocks` gives
            them, where they are known; otherwise they are computed.
        planner: one of `PLANNERS`.
        given: the choice itself, for planner `"given"`, which reads no other option.
        latent_mask: `[B or 1, Tq, Tk]` bool, which latents see which; all by default.
        checked: the caller has checked keys and means.

    Raises:
        ValueError: if an option is out of range, or something does not fit the layout.
    """
    if planner not in PLANNERS or (planner == "given") != (given is not None):
        raise ValueError(
            f"planner must be one of {', '.join(PLANNERS)}, with blocks where it is 'given', got "
            f"{planner!r} {'without' if given is None else 'with'} blocks; use 'mean'"
        )
    if given is not None:
        if why := unfit_blocks(given, q, layout, q_grid):
            raise ValueError(why)
        return plan_as_given(given, q, layout, q_grid)
    candidate = layout.candidate_segment(role)
    if not checked:
        if why := _unfit_keys(q, keys, layout):
            raise ValueError(why)
        if candidate_means is not None:
            check_means(candidate_means, q, layout, candidate)
    if planner == "cosine" and candidate is not None:
        candidate_means = _directions(keys[candidate], layout, candidate, candidate_means)
    if candidate is not None and keep_frames is None and latent_mask is None:
        plan = _plan_natively(
            q, keys[candidate], layout, q_grid, budget, scale, role, sink_latents, candidate_means
        )
        if plan is None:
            plan = _plan_by_triton(
                q, keys[candidate], layout, q_grid, budget, scale, role, sink_latents,
                candidate_means,
            )  # fmt: skip
        if plan is not None:
            return plan
    q_mean = pool_blocks(q, q_grid.laid)
    if candidate is None:
        k_mean = q_mean[:, :, :0]
    elif candidate_means is not None:
        k_mean = candidate_means
    else:
        k_mean = pool_blocks(keys[candidate], layout.segments[candidate].grid.laid)
    indices, counts = select_blocks(
        q_mean,
        k_mean,
        layout,
        q_grid,
        budget=budget,
        scale=scale,
        role=role,
        sink_latents=sink_latents,
        keep_frames=keep_frames,
        seen=None if latent_mask is None else seen_blocks(latent_mask, q_grid, layout),
    )
    key_keep = None
    if keep_frames is not None and candidate is not None:
        key_keep = _key_keep(layout, candidate, keep_frames)
    return BlockPlan(
        indices,
        counts,
        q_grid.laid,
        layout.laid,
        key_keep=key_keep,
        uniform=keep_frames is None and latent_mask is None,
        shared_segments=() if latent_mask is not None else _shared(layout, candidate),
    )


def _directions(keys: Tensor, layout: KvLayout, candidate: int, means: Tensor | None) -> Tensor:
    """Scale the means of key blocks to length 1: products then rank as cosines do.

    The length of a query's mean is one factor for all that it ranks, so it does not enter.

    Source: the release of arXiv 2605.31158 for Matrix-Game-3.0 ranks by cosine of means.
    """
    if means is None:
        means = pool_blocks(keys, layout.segments[candidate].grid.laid)
    return torch.nn.functional.normalize(means, dim=-1)


def _unfit_keys(q: Tensor, keys: list[Tensor], layout: KvLayout) -> str | None:
    """Say how keys do not go with the queries or the layout, or return None."""
    if q.dim() != 4:
        return f"q must be [B, H, Lq, D], got {list(q.shape)}; reshape it"
    if why := unfit_heads("k", keys, q):
        return why
    tokens = [part.shape[2] for part in keys]
    if tokens == layout.segment_tokens:
        return None
    return (
        f"k must hold {layout.segment_tokens} tokens by segment, got {tokens}; pass one tensor "
        "per segment of the layout, in order"
    )


def check_means(means: Tensor, q: Tensor, layout: KvLayout, candidate: int | None) -> None:
    """Check that means are those of the blocks of a segment.

    Raises:
        ValueError: if they are not `[B, H, N, D]` fp32.
    """
    blocks = 0 if candidate is None else layout.segments[candidate].grid.blocks
    expected = (*q.shape[:2], blocks, q.shape[3])
    if means.shape != expected or means.dtype != torch.float32:
        raise ValueError(
            f"means of the candidates must be [B, H, N, D] = {list(expected)} fp32, got "
            f"{list(means.shape)} {means.dtype}; pool the keys with the tile of the call"
        )


def _plan_natively(
    q: Tensor,
    candidates: Tensor,
    layout: KvLayout,
    q_grid: BlockGrid,
    budget: float,
    scale: float,
    role: str,
    sink_latents: int,
    candidate_means: Tensor | None,
) -> BlockPlan | None:
    """Pool and select in one compiled call; None where it is not built or does not apply."""
    if q.device.type != "cpu" or q.dtype not in native.DTYPES or native.why_not_loaded():
        return None
    check_options(layout, q_grid, budget, scale, role)
    rule = rule_of(layout, q_grid, budget, role, sink_latents, q.device)
    laid, rows = layout.laid, q_grid.laid
    indices = native.plan_blocks(
        q.detach(), candidates.detach(), rows, laid, rule._replace(grid=rule.grid.laid),
        candidate_means,
    )  # fmt: skip
    counts = _full_counts(tuple(indices.shape))
    shared = _shared(layout, layout.candidate_segment(role))
    return BlockPlan(indices, counts, rows, laid, uniform=True, shared_segments=shared)


def _plan_by_triton(
    q: Tensor,
    candidates: Tensor,
    layout: KvLayout,
    q_grid: BlockGrid,
    budget: float,
    scale: float,
    role: str,
    sink_latents: int,
    candidate_means: Tensor | None,
) -> BlockPlan | None:
    """Pool and select by kernels, past the choice of providers; None where one does not apply.

    What that choice and its checks take is a fifth of what planning costs the host.
    """
    if chip.INTERPRETED or chip.why_not(q.device):
        return None  # before Triton is imported
    pool, select = registry.module_of("pool", "triton"), registry.module_of("select", "triton")
    if isinstance(pool, str) or isinstance(select, str):
        return None
    laid, rows = layout.laid, q_grid.laid
    if pool.why_not(q, rows) or (candidate_means is None and pool.why_not(candidates, rows)):
        return None
    check_options(layout, q_grid, budget, scale, role)
    number = layout.candidate_segment(role)
    assert number is not None
    q_mean = pool.pool_blocks(q, rows)
    if candidate_means is None:
        candidate_means = pool.pool_blocks(candidates, laid.segments[number].grid)
    indices, counts = select.select_blocks(
        q_mean, candidate_means, layout, q_grid, budget=budget, role=role,
        sink_latents=sink_latents, keep_frames=None,
    )  # fmt: skip
    shared = _shared(layout, number)
    return BlockPlan(indices, counts, rows, laid, uniform=True, shared_segments=shared)


@functools.lru_cache(maxsize=512)
def _shared(layout: KvLayout, candidate: int | None) -> tuple[int, ...]:
    """Segments that every query block visits whole."""
    return tuple(n for n in range(len(layout.segments)) if n != candidate)


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _full_counts(shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape[:-1], shape[-1], dtype=torch.int32)


def _key_keep(layout: KvLayout, candidate: int, keep_frames: Tensor) -> Tensor:
    """Mask tokens of dropped frames in tiles that hold a kept frame, `[B, Lk]` bool.

    A tile without a kept frame stays open: nobody visits it but, in prefill, its own queries.
    """
    grid, span = layout.segments[candidate].grid, layout.token_range(candidate)
    frame = grid.over_tokens(keep_frames)
    dropped_tile = ~grid.blocks_with(keep_frames)[:, grid.block_of_token(keep_frames.device)]
    keep = torch.ones(
        keep_frames.shape[0], layout.tokens, dtype=torch.bool, device=keep_frames.device
    )
    keep[:, span.start : span.stop] = frame | dropped_tile
    return keep
