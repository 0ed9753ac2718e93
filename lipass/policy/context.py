"""Choose which history latents the model reads for the next chunk, and say why for each of them.

Three groups are kept: the sink (first latents), the temporal window (latest chunks) and spatial
memory (earlier latents that show the view to be generated).

Window: `D = MSE(z[t-1], z[t-2])` between the latents of the two latest chunks. `D <= dynamics_low`
gives `window_chunks_max` chunks, `D >= dynamics_high` gives `window_chunks_min`, in between the
lengths strictly between them in equal steps: what changes fast is worth remembering briefly. A
model whose past is fixed says so (`window_latents`).
Source: arXiv 2605.31158, Fig. 1a; thresholds and steps are ours, the release has a fixed window.

Memory: greedy maximum coverage. The views to be generated are sampled at points; each round takes
the latent that adds most to what the sink and the chosen latents show of them, until it adds less
than `gain_min`. Top-k by overlap would pick neighbours that all show the same. What the window
shows does not count as covered, because its latents are the model's own newest output and memory
is what keeps that from drifting; but a latent that adds nothing to a single window latent is a
duplicate. Latents of an earlier visit, which the camera has left since, are neither duplicates nor
subject to `gain_min`: they have drifted less than what repeats them. With `memory_chunks` whole
chunks are chosen instead (`lipass.policy.chunk_memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lipass.options import ContextOptions
from lipass.policy.chunk_memory import choose_chunks
from lipass.policy.indices import indices_of
from lipass.policy.latents import LatentReading, read_latents
from lipass.policy.revisit import left_since

# Views that differ by less than this share show the same.
_SAME_VIEW = 1e-3
_NOT_HELD = "dropped: the model does not hold it"
_POLICY_OFF, _BY_LOOP = "kept: context policy is off", "dropped: by the loop itself"


@dataclass(frozen=True, slots=True)
class FrameDecision:
    """What happens to one history latent.

    Attributes:
        index: position in the history.
        kept: whether the model reads it.
        reason: "sink", "window", "memory 0.83", "dropped: overlap 0.12 < 0.30", ...
        overlap: share of the new views it shows; None where it was not scored.
    """

    index: int
    kept: bool
    reason: str
    overlap: float | None


@dataclass(frozen=True)
class ContextPlan:
    """What the model reads for one chunk.

    Attributes:
        frames: one decision a history latent, ascending.
        window_chunks: length of the temporal window; None without the context policy.
        dynamics: `D`; None where there are no two chunks of latents to compare.
        power: mean square of the latest latents, 1 for normalised ones; None where none were read.
    """

    frames: tuple[FrameDecision, ...]
    window_chunks: int | None
    dynamics: float | None
    power: float | None = None

    @property
    def indices(self) -> list[int]:
        """Kept latents, ascending, each once."""
        return [frame.index for frame in self.frames if frame.kept]

    @property
    def chosen(self) -> bool:
        """Whether a policy has decided, and not the loop."""
        return any(frame.reason not in (_POLICY_OFF, _BY_LOOP) for frame in self.frames)

    def to_dict(self) -> dict[str, Any]:
        """Give plain data; `from_dict` takes it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ContextPlan:
        """Rebuild a plan from `to_dict`."""
        frames = tuple(FrameDecision(**frame) for frame in data["frames"])
        return cls(frames, data["window_chunks"], data["dynamics"], data.get("power"))


def keep(
    history: int, own_context: Sequence[int] | None, name: str = "own_context"
) -> ContextPlan:
    """Keep what the loop reads by itself: the plan without a context policy.

    Args:
        history: latents of the history.
        own_context: indices into it; None is all of it.
        name: of the argument, for errors.

    Raises:
        TypeError: no list of ints.
        ValueError: an index outside the history or given twice.
    """
    kept = set(range(history) if own_context is None else indices_of(own_context, history, name))
    reasons = [(i, _POLICY_OFF if i in kept else _BY_LOOP) for i in range(history)]
    frames = (FrameDecision(i, i in kept, reason, None) for i, reason in reasons)
    return ContextPlan(tuple(frames), None, None)


def plan_window(
    history: int, read: LatentReading, options: ContextOptions, held: Sequence[int] | None = None
) -> ContextPlan:
    """Choose without cameras: sink and temporal window, as nothing says what the rest shows.

    Args: as in `plan_context`; `read` is what the latest latents say.
    """
    dynamics, power = read
    window_latents, window_chunks = options.window_latents, None
    if window_latents is None:
        window_chunks = window_length(dynamics, options)
        window_latents = window_chunks * options.chunk_latents
    held = range(history) if held is None else held
    reasons = dict.fromkeys(held, "dropped: no cameras, and older than the window")
    reasons |= dict.fromkeys(held[-window_latents:], "window")
    reasons |= dict.fromkeys(held[: options.sink_latents], "sink")
    frames = []
    for index in range(history):
        reason = reasons.get(index, _NOT_HELD)
        frames.append(FrameDecision(index, not reason.startswith("dropped"), reason, None))
    return ContextPlan(tuple(frames), window_chunks, dynamics, power)


def among(plan: ContextPlan, held: Sequence[int]) -> ContextPlan:
    """Drop what a model does not hold any more, such as what a rolled cache has lost.

    Args:
        plan: what would be read if all were there.
        held: indices into the history.

    Raises:
        ValueError: an index outside the history or given twice.
    """
    there = set(indices_of(held, len(plan.frames), "held"))
    frames = [
        frame if frame.index in there else replace(frame, kept=False, reason=_NOT_HELD)
        for frame in plan.frames
    ]
    return replace(plan, frames=tuple(frames))


def plan_context(
    visibility: Tensor,
    latents: Tensor | LatentReading | None,
    options: ContextOptions,
    held: Sequence[int] | None = None,
    history: int | None = None,
) -> ContextPlan:
    """Choose the latents of the next chunk's context.

    Args:
        visibility: `[q, h, P]` from `score_points`, of what is held against new views.
        latents: `[M, ...]` history, or what was read of it; None leaves the window longest.
        options: budgets and thresholds.
        held: the h indices into the history that the model holds, ascending; sink and window are
            the first and last of them. None holds all.
        history: M; None is h.

    Raises:
        ValueError: latents that do not match the history or are not finite.
    """
    held = range(visibility.shape[1]) if held is None else held
    history = len(held) if history is None else history
    dynamics, power, window_chunks = None, None, None
    window_latents = options.window_latents
    if window_latents is None:
        read = latents
        if not isinstance(read, LatentReading):
            read = read_latents(read, history, options.chunk_latents)
        dynamics, power = read
        window_chunks = window_length(dynamics, options)
        window_latents = window_chunks * options.chunk_latents
    reasons: dict[int, str] = {}
    window = range(max(0, len(held) - window_latents), len(held))
    sink = range(min(options.sink_latents, len(held)))
    reasons.update(dict.fromkeys(window, "window"))
    reasons.update(dict.fromkeys(sink, "sink"))

    points = visibility.transpose(0, 1).flatten(1)  # [h, q * P]
    overlap = points.mean(1).tolist()
    left = left_since(visibility.mean(-1), options.departure_min).any(0)
    earlier_visit = set(left.nonzero()[:, 0].tolist())
    if options.memory_chunks is None:
        memory = _choose_memory(
            points, overlap, held, list(sink), list(window), earlier_visit, options
        )
    else:
        memory = choose_chunks(overlap, held, {*sink, *window}, options, history)
    reasons.update(memory)
    frames = {}
    for place, index in enumerate(held):
        reason, share = reasons[place], round(overlap[place], 4)
        frames[index] = FrameDecision(index, not reason.startswith("dropped"), reason, share)
    decided = (frames.get(i) or FrameDecision(i, False, _NOT_HELD, None) for i in range(history))
    return ContextPlan(tuple(decided), window_chunks, dynamics, power)


def window_length(dynamics: float | None, options: ContextOptions) -> int:
    """Map latent dynamics to a window length in chunks; never longer for higher dynamics."""
    longest, shortest = options.window_chunks_max, options.window_chunks_min
    if dynamics is None or dynamics <= options.dynamics_low:
        return longest
    if dynamics >= options.dynamics_high:
        return shortest
    rise = (dynamics - options.dynamics_low) / (options.dynamics_high - options.dynamics_low)
    between = longest - shortest - 1
    if between < 1:
        return longest if rise < 0.5 else shortest
    return longest - 1 - int(rise * between)


def _choose_memory(
    points: Tensor,
    overlap: list[float],
    held: Sequence[int],
    sink: list[int],
    window: list[int],
    earlier_visit: set[int],
    options: ContextOptions,
) -> dict[int, str]:
    """Give a reason for each latent outside sink and window; those chosen say "memory".

    By places in what is held; `held` has their names.
    """
    reasons: dict[int, str] = {}
    taken = {*sink, *window}
    rest = []
    for index in range(len(points)):
        if index in taken:
            continue
        if overlap[index] < options.overlap_min:
            reasons[index] = f"dropped: overlap {overlap[index]:.2f} < {options.overlap_min:.2f}"
        else:
            rest.append(index)

    same_visit = [index for index in rest if index not in earlier_visit]
    for index, twin in _twins(points, same_visit, window, options.gain_min).items():
        if twin is not None:
            reasons[index] = f"dropped: duplicates {held[twin]}"
            rest.remove(index)
    covered = points[sink].amax(0) if sink else torch.zeros_like(points[0])
    chosen: list[int] = []
    while rest and len(chosen) < options.memory_latents:
        gains = (points[rest] - covered).clamp_min(0).mean(1)
        if float(gains.max()) < options.gain_min:
            # All is covered; what is left to gain is latents that have drifted less.
            same = _twins(points, rest, [*sink, *chosen], _SAME_VIEW)
            useful = [i in earlier_visit and same[i] is None for i in rest]
            scores = zip(rest, useful, strict=True)
            rank = torch.tensor([overlap[i] if ok else -1.0 for i, ok in scores])
            if float(rank.max()) < 0:
                break
        else:
            rank = gains
        # The latest of equal views: it shares most with the chunk that follows.
        index = rest.pop(len(rest) - 1 - int(rank.flip(0).argmax()))
        chosen.append(index)
        reasons[index] = f"memory {overlap[index]:.2f}"
        covered = torch.maximum(covered, points[index])

    twins = _twins(points, rest, [*sink, *chosen, *window], options.gain_min)
    for index in rest:
        if (twin := twins[index]) is not None:
            reasons[index] = f"dropped: duplicates {held[twin]}"
        elif len(chosen) == options.memory_latents:
            reasons[index] = f"dropped: {len(chosen)} memory latents show more"
        else:
            reasons[index] = f"dropped: adds less than {options.gain_min:.2f} to the memory"
    return reasons


def _twins(
    points: Tensor, indices: list[int], kept: list[int], gain_min: float
) -> dict[int, int | None]:
    """Find for each latent the kept one that alone shows nearly all that it shows."""
    if not indices or not kept:
        return dict.fromkeys(indices)
    views = points[indices]
    adds = torch.stack([(views - points[other]).clamp_min_(0).mean(1) for other in kept])
    least, nearest = adds.min(0)
    return {
        index: kept[position] if value < gain_min else None
        for index, position, value in zip(indices, nearest.tolist(), least.tolist(), strict=True)
    }
