"""Run one call sparse or dense, whichever pays, over the frames that are kept, and count it."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lipass.kernels import cost, registry
from lipass.kernels.block_sparse import in_order
from lipass.kernels.block_sparse.kind import Asking
from lipass.kernels.call import Call, check
from lipass.kernels.dense_call import attend_densely, hidden
from lipass.kernels.estimate import capturing, kept_mass
from lipass.kernels.frames import attend_own_frame, mixes_latents, row_major, without_frames
from lipass.kernels.given import plan_as_given
from lipass.kernels.latent_mask import seen_from_blocks
from lipass.kernels.nearest.order import among_frames
from lipass.kernels.nearest.plan import Buckets, in_rows, plan_in_order
from lipass.kernels.plan import BlockPlan
from lipass.kernels.planning import plan_attention
from lipass.kernels.select.api import selected_blocks
from lipass.kernels.steered import attend_by_latent
from lipass.kernels.tile_order import token_at_place
from lipass.kernels.token_major import empty_token_major, token_major

Attended = tuple[Tensor, Tensor | None]


def attend(call: Call, *, lse: bool) -> Attended:
    """Attend, and give the log-sum-exp `[B, H, Lq]` fp32 where it is asked for.

    Raises:
        ValueError: if the call does not fit together or an option is out of range.
    """
    check(call)
    if call.ramp is not None:
        return _attend_by_latent(call, call.ramp, lse)
    if call.buckets is not None:
        return _attend_in_order(call, call.buckets, lse)
    total = call.q.shape[0] * call.q.shape[1] * call.q_grid.blocks * call.layout.blocks
    keep = call.keep_frames
    if keep is None:
        return _attend(call, total, 0, lse)
    if call.candidate is None:
        return _attend(call._replace(keep_frames=None), total, 0, lse)
    if keep.device.type != "cpu":
        return _attend(call, total, 0, lse)
    # On the host the mask can be read for free: frames that no batch item keeps leave before
    # tiling, so that kept frames fill their tiles.
    if keep.all():
        return _attend(call._replace(keep_frames=None), total, 0, lse)
    if mixes_latents(call):
        return _attend_row_major(call, lse)
    kept = keep.any(0).nonzero()[:, 0]
    dropped = keep.shape[1] - kept.numel()
    uniform = bool((keep.any(0) == keep.all(0)).all())
    smaller = call._replace(
        sink_latents=int((kept < call.sink_latents).sum()),
        keep_frames=None if uniform else keep.index_select(1, kept).to(call.q.device),
    )
    if dropped == 0:
        return _attend(smaller, total, 0, lse)
    if call.role == "decode":
        return _attend(without_frames(smaller, kept), total, dropped, lse)
    return _attend_prefill_without(call, smaller, kept, total, lse)


def _attend_by_latent(call: Call, ramp: Tensor, lse: bool) -> Attended:
    """Attend to every kept key, each latent of the queries with a row of its own."""
    if lse:
        raise ValueError(
            "a log-sum-exp is of calls in which all latents have one bias, got a row for each; "
            "let the prompt change by policy 'slerp'"
        )
    if call.keep_frames is not None and call.candidate is not None:
        ramp = ramp + hidden(call._replace(key_bias=None), call.keep_frames)[:, :, None]
    k, v = torch.cat(call.k, 2), torch.cat(call.v, 2)
    out = token_major(attend_by_latent(call.q, k, v, ramp, call.scale))
    blocks = call.q.shape[0] * call.q.shape[1] * call.q_grid.blocks * call.layout.blocks
    registry.record_call(
        call.site, role=call.role, total=blocks, provider="sdpa", visited=blocks,
        kept_dense="the prompt changes from latent to latent",
    )  # fmt: skip
    return out, None


def _attend_row_major(call: Call, lse: bool) -> Attended:
    """Attend to tokens that were put back in place first, so that frames are runs of them."""
    out, log_sums = attend(row_major(call), lse=lse)
    if not call.q_grid.in_order:
        return out, log_sums
    order = token_at_place(call.q_grid.grid, call.q_grid.tile).to(out.device)
    rows = out.index_select(2, order)
    return token_major(rows), None if log_sums is None else log_sums.index_select(2, order)


def _attend_in_order(call: Call, buckets: Buckets, lse: bool) -> Attended:
    """Attend by blocks of like keys; dropped frames leave the order, or are hidden by the bias."""
    total = call.q.shape[0] * call.q.shape[1]
    total *= math.prod(n.blocks for n in in_rows(call.layout, call.q_grid))
    keep, number, dropped = call.keep_frames, call.candidate, 0
    assert number is not None
    grid = call.layout.segments[number].grid
    if keep is not None and keep.device.type == "cpu" and bool((keep == keep[:1]).all()):
        kept = keep[0].nonzero()[:, 0]
        dropped = keep.shape[1] - kept.numel()
        if dropped:
            order = among_frames(buckets.order, grid, keep[0])
            call = without_frames(call._replace(history_means=None, keep_frames=None), kept)
            call = call._replace(sink_latents=int((kept < call.sink_latents).sum()))
            buckets = buckets._replace(order=order)
    elif keep is not None:
        call = call._replace(key_bias=hidden(call, keep))
    layout, q_grid = in_rows(call.layout, call.q_grid)
    per_latent = grid.tokens // max(grid.grid[0], 1)
    call = call._replace(
        keep_frames=None,
        layout=layout,
        q_grid=q_grid,
        sink_latents=call.sink_latents * per_latent,
        buckets=buckets,
    )
    return _attend(call, total, dropped, lse)


def _attend_prefill_without(
    call: Call, smaller: Call, kept: Tensor, total: int, lse: bool
) -> Attended:
    """Attend where queries are dropped too; their rows see text and their own frame."""
    assert call.keep_frames is not None
    lost = (~call.keep_frames.any(0)).nonzero()[:, 0].to(call.q.device)
    parts: list[tuple[Tensor, Attended]] = [(lost, attend_own_frame(call, lost))]
    if kept.numel():
        rest = _attend(without_frames(smaller, kept), total, lost.numel(), lse)
        parts.append((kept.to(call.q.device), rest))
    out = empty_token_major(call.q)
    log_sums = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    for whole, index in ((out, 0), (log_sums, 1)):
        frames = whole.unflatten(2, (call.q_grid.grid[0], -1))
        for rows, part in parts:
            if (made := part[index]) is not None:
                frames[:, :, rows] = made.reshape(frames[:, :, rows].shape)
    return out, log_sums if lse else None


def _attend(call: Call, total_blocks: int, dropped_latents: int, lse: bool) -> Attended:
    """Run one call sparse or dense, whichever the gate says, and count it."""
    biased = call.key_bias is not None or call.keep_frames is not None
    laid = call.q_grid.laid, call.layout.laid
    asking = Asking(call.q, call.k, call.v, *laid, biased, call.key_bias)
    chosen = registry.find("block_sparse", call.q.device, asking, asking.measured)
    reason = _why_dense(call, chosen)
    if not reason or isinstance(chosen, registry.Refused):
        for name, refusal in chosen.refusals:
            registry.record_refusal(call.site, name, refusal)
    if reason or isinstance(chosen, registry.Refused):
        visited = call.q.shape[0] * call.q.shape[1] * call.q_grid.blocks * call.layout.blocks
        out, log_sums, provider = attend_densely(call, lse)
        registry.record_call(
            call.site, role=call.role, total=total_blocks, dropped_latents=dropped_latents,
            provider=provider, visited=visited, kept_dense=reason,
        )  # fmt: skip
        return out, log_sums
    plan, kept = _planned(call)
    mass = None
    if registry.is_sampled(call.site) and not capturing():
        seen = None
        if (mask := _mask_beside(call)) is not None:
            seen = functools.partial(seen_from_blocks, mask, call.q_grid, call.layout)
        mass = kept_mass(call.q, call.k, plan, call.scale, call.key_bias, seen)
    registry.record_call(
        call.site, role=call.role, total=total_blocks, dropped_latents=dropped_latents,
        provider=chosen.name, mass=mass, kept_plan=kept,
        visited=plan.indices.numel() if plan.uniform else plan.counts.sum(),
    )  # fmt: skip
    out, log_sums = in_order.attend(
        chosen.module, call.q, call.k, call.v, plan, scale=call.scale, key_bias=call.key_bias,
        return_lse=lse, laid=asking.laid,
    )  # fmt: skip
    return out, log_sums if lse else None


def _planned(call: Call) -> tuple[BlockPlan, bool]:
    """Plan a call, or follow a plan that was made before; `registry.answer("block_plan", ..)`."""
    known = None if call.given is not None else registry.answer_of("block_plan")
    return (_plan(call), False) if known is None else known(call, _plan)


def _plan(call: Call) -> BlockPlan:
    if call.given is not None:
        return plan_as_given(call.given, call.q, call.layout, call.q_grid)
    if call.buckets is not None:
        return plan_in_order(
            call.q,
            call.k,
            call.layout,
            call.q_grid,
            call.buckets,
            budget=call.budget,
            scale=call.scale,
            first=call.sink_latents,
            means=call.history_means,
        )
    return plan_attention(
        call.q,
        call.k,
        call.layout,
        call.q_grid,
        budget=call.budget,
        scale=call.scale,
        role=call.role,
        sink_latents=call.sink_latents,
        keep_frames=call.keep_frames,
        candidate_means=call.history_means,
        planner=call.planner,
        latent_mask=_mask_beside(call),
        checked=True,
    )


def _mask_beside(call: Call) -> Tensor | None:
    """Bring the mask of a call to its queries."""
    mask = call.latent_mask
    return None if mask is None else mask.to(call.q.device, non_blocking=True)


def _why_dense(call: Call, chosen: registry.Choice | registry.Refused) -> str:
    """Give the reason to run dense attention over the kept keys, or nothing."""
    route = registry.forced_route(call.role)
    if route == "dense":
        return registry.forced_reason()
    if call.given is None and not call.scale > 0:
        return f"blocks are ranked by a positive scale, got {call.scale:g}"
    if call.given is None and call.budget >= 1.0 and call.latent_mask is None:
        return "budget 1.0 visits every block"
    if isinstance(chosen, registry.Refused):
        return chosen.reason
    if route == "sparse":
        return ""
    if call.given is not None:
        width = call.given.blocks.shape[3]
    else:
        width = selected_blocks(
            call.layout, call.q_grid, call.budget, call.role, call.sink_latents
        )
        if call.latent_mask is not None:
            width = _seen_share(width, call.latent_mask)
        elif width == call.layout.blocks and call.keep_frames is None:
            return "protected blocks and budget together visit every block"
    q, sorts = call.q, call.buckets is not None
    return cost.predict(
        q.shape, q.dtype, q.device, call.layout, call.q_grid, width, sorts=sorts
    ).why_dense


def _seen_share(width: int, mask: Tensor) -> int:
    """Estimate how many of so many blocks a mask leaves; all of them where reading has a price."""
    if mask.device.type != "cpu" or mask.numel() == 0:
        return width
    return math.ceil(width * float(mask.float().mean()))
