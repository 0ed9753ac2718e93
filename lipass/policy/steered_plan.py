"""Say what a change of the prompt means for the context of a chunk and for its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lipass.policy.blend import Blend
from lipass.policy.context import ContextPlan
from lipass.policy.plan import ChunkPlan
from lipass.policy.revisit import Revisit
from lipass.policy.steering import Steering

_FLUSHED = "dropped: flushed when the prompt changed"
_OLDER = "dropped: older than the window that grows"


def steered(
    plan: ChunkPlan,
    blend: Blend,
    steering: Steering,
    flushed: list[tuple[int, int]],
    as_new: Callable[[int], bool],
    held: Sequence[int] | None = None,
    *,
    off: bool = False,
) -> ChunkPlan:
    """Return the plan of a chunk that has a prompt.

    Args:
        plan: as without one.
        blend: what the prompt is made of.
        steering: how the change goes that it is part of.
        flushed: ranges of latents that earlier changes gave up.
        as_new: tells whether a latent was made under the text that is new now.
        held: latents that the model holds; None is all of the history.
        off: whether nothing may be left out.
    """
    flush = blend.since - steering.newest_latents
    if blend.place == 1 and steering.policy == "flush" and flush > steering.sink_latents:
        blend = replace(blend, flush=(steering.sink_latents, flush))
    if blend.place == 1 and steering.policy == "recache":
        there = range(blend.since) if held is None else sorted(held)
        blend = replace(blend, recache=tuple(there[-steering.recache_latents :]))
    if off:
        return replace(plan, steering=blend)
    hidden = [*flushed, *([blend.flush] if blend.flush else [])]
    context = _without(plan.context, hidden, _FLUSHED)
    if steering.grow_latents is not None and blend.changes:
        end = plan.history_latents - blend.place * steering.grow_latents
        hidden = [(steering.sink_latents, end)]
        context = _without(context, hidden, _OLDER)
    revisit = _revisit(plan.revisit, blend, as_new)
    return replace(plan, steering=blend, context=context, revisit=revisit)


def leaves_out(context: ContextPlan) -> bool:
    """Whether a change of the prompt has dropped latents that would have been read."""
    return any(not frame.kept and frame.reason in (_FLUSHED, _OLDER) for frame in context.frames)


def _without(context: ContextPlan, hidden: list[tuple[int, int]], reason: str) -> ContextPlan:
    """Drop kept latents in ranges."""
    frames = tuple(
        replace(frame, kept=False, reason=reason)
        if frame.kept and any(first <= frame.index < last for first, last in hidden)
        else frame
        for frame in context.frames
    )
    return replace(context, frames=frames)


def _revisit(revisit: Revisit, blend: Blend, as_new: Callable[[int], bool]) -> Revisit:
    """Have steps computed where what would be seen again was made under another prompt."""
    if not revisit.allowed:
        return revisit
    if blend.weight < 1 or blend.ramps or blend.place == 1:
        why = f"the prompt changes, chunk {blend.place} of {blend.of}"
    elif revisit.latent is not None and not as_new(revisit.latent):
        why = f"latent {revisit.latent} was made under another prompt"
    else:
        return revisit
    return replace(revisit, allowed=False, reason=f"{why}, so all is computed ({revisit.reason})")
