"""Ask what single history latents are worth, and whether view overlap foresees it.

The last chunk of a walk is made again from its window and one more latent of the history, all
else as in the dense rollout. The latent is worth as many dB as it brings the chunk closer to what
the dense model makes of all of its context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lipass.policy.context import FrameDecision
from lipass.policy.plan import ChunkPlan

_EDGES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Worth:
    """What one latent is worth to one chunk.

    Attributes:
        walk: name of the walk.
        latent: position in the history.
        overlap: share of the new view that it shows.
        db: how much closer to dense the chunk is with it.
    """

    walk: str
    latent: int
    overlap: float
    db: float


def asked(scored: ChunkPlan, window: int, count: int) -> list[FrameDecision]:
    """Choose latents in front of the window, evenly over what they show.

    Args:
        scored: a plan in which latents have overlaps.
        window: latents of the window.
        count: how many.
    """
    earlier = scored.context.frames[: max(scored.history_latents - window, 0)]
    there = sorted((one for one in earlier if one.overlap is not None), key=_overlap)
    if len(there) <= count:
        return there
    places = {round(n * (len(there) - 1) / max(count - 1, 1)) for n in range(count)}
    return [there[place] for place in sorted(places)]


def reading(plan: ChunkPlan, latents: Sequence[int]) -> ChunkPlan:
    """Give a plan that reads these latents of the history and no others."""
    frames = tuple(
        FrameDecision(one.index, one.index in latents, "asked", one.overlap)
        for one in plan.context.frames
    )
    return replace(plan, context=replace(plan.context, frames=frames))


def worth_of(
    walk: str,
    dense: Sequence[ChunkPlan],
    scored: ChunkPlan,
    window: int,
    count: int,
    error: Callable[[Sequence[ChunkPlan]], float],
) -> Iterator[Worth]:
    """Ask about some latents of the last chunk of a walk.

    Args:
        walk: its name.
        dense: plans of the dense rollout.
        scored: plan of its last chunk in which latents have overlaps.
        window: latents of a window.
        count: how many to ask about.
        error: of the rollout that follows plans, mean squared.
    """
    latents = asked(scored, window, count)
    history = scored.history_latents
    recent = [*range(history - window, history)]
    if not latents:
        return
    without = error([*dense[:-1], reading(dense[-1], recent)])
    for one in latents:
        found = error([*dense[:-1], reading(dense[-1], [one.index, *recent])])
        if found > 0 and without > 0:
            db = 10 * math.log10(without / found)
            yield Worth(walk, one.index, _overlap(one), round(db, 3))


def curve(found: Sequence[Worth]) -> list[dict[str, Any]]:
    """Give what latents are worth on average, by how much of the view they show."""
    bins: dict[int, list[float]] = {}
    for one in found:
        bins.setdefault(sum(one.overlap >= edge for edge in _EDGES), []).append(one.db)
    limits = (0.0, *_EDGES, 1.0)
    return [
        {
            "overlap": [limits[place], limits[place + 1]],
            "latents": len(own),
            "db": round(sum(own) / len(own), 2),
        }
        for place, own in sorted(bins.items())
    ]


def correlation(found: Sequence[Worth]) -> float | None:
    """Return Spearman's rank correlation of overlap and worth; None where it says nothing."""
    if len(found) < 3:
        return None
    ranks = [_ranks([one.overlap for one in found]), _ranks([one.db for one in found])]
    means = [sum(own) / len(own) for own in ranks]
    away = [[value - mean for value in own] for own, mean in zip(ranks, means, strict=True)]
    scale = math.sqrt(sum(a * a for a in away[0]) * sum(b * b for b in away[1]))
    return sum(a * b for a, b in zip(*away, strict=True)) / scale if scale > 0 else None


def plain(found: Sequence[Worth]) -> dict[str, Any]:
    """Give all as plain data."""
    return {
        "correlation": correlation(found),
        "curve": curve(found),
        "latents": [asdict(one) for one in found],
    }


def _overlap(frame: FrameDecision) -> float:
    assert frame.overlap is not None
    return frame.overlap


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank values from 0; equal ones share the mean of their places."""
    ordered = sorted(values)
    return [
        (ordered.index(value) + len(ordered) - 1 - ordered[::-1].index(value)) / 2
        for value in values
    ]
