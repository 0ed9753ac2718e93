"""Decide whether the next chunk revisits: shows again what the camera has left in between.

For a new view k and a history latent h let `o(k, h)` be the view overlap. The camera has *been
away* from k since h if some later latent j > h shows it clearly less: `o(k, j) <= o(k, h) -
departure_min`. Then

    score = mean over k of max { o(k, h) : the camera has been away from k since h }
    revisit  <=>  score >= overlap_min  and  score >= mean over k of o(k, latest latent)

Walking or turning on steadily, each latent shows the new view better than the one before it, so
nothing has been left and the score is 0: exploration never counts, however slow. On the way back
the score rises within a chunk of the turn. The second condition keeps a glance aside from turning
the forward walk that follows into a revisit: there the latest latent shows more than the old
ones. All latents take part, the sink too, and the temporal window does not matter. Standing still
is not a revisit (nothing was left) until the place had been left and reached again.

Source: own. Light Interaction's gate, `max S >= 0.7` over latents older than the window, fires
while walking forward and excludes the sink; see `lipass.policy.reference_worldplay`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lipass.options import StepOptions

# Scores are means of float32 products; equal views may differ in the last digits.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Revisit:
    """Whether a chunk may reuse denoising steps.

    Attributes:
        allowed: the decision.
        score: how well earlier latents show the new views; None where nothing was scored.
        latent: history latent that shows most of them, among those the camera has left; or None.
        reason: one line for the report.
    """

    allowed: bool
    score: float | None
    latent: int | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Give plain data; `Revisit(**data)` takes it back."""
        return asdict(self)


def left_since(overlap: Tensor, departure_min: float) -> Tensor:
    """Tell for which new views the camera has been away since each history latent but the last.

    Args:
        overlap: `[q, M]` of the new views with the history, in temporal order.
        departure_min: how much less a later latent must show.

    Returns:
        `[q, M - 1]` bool.
    """
    lowest_later = overlap[:, 1:].flip(1).cummin(1).values.flip(1)
    return lowest_later <= overlap[:, :-1] - departure_min


def decide_revisit(
    overlap: Tensor, options: StepOptions, held: Sequence[int] | None = None
) -> Revisit:
    """Decide from the overlaps of the new views with what the model holds of the history.

    Args:
        overlap: `[q, h]`, in temporal order.
        options: thresholds.
        held: the h indices into the history; None holds all.
    """
    names = range(overlap.shape[1]) if held is None else held
    if overlap.shape[1] == 0:
        return Revisit(False, None, None, "no history")
    if options.overlap_min == 0:
        return Revisit(True, None, None, "steps.overlap_min is 0")
    left = left_since(overlap, options.departure_min)
    returned = torch.where(left, overlap[:, :-1], 0.0)
    if not bool(left.any()):
        return Revisit(False, 0.0, None, "exploring: no earlier view was left and reached again")
    score = float(returned.amax(1).mean())
    latest = float(overlap[:, -1].mean())
    best = names[int(returned.mean(0).argmax())]
    if score < options.overlap_min:
        reason = f"exploring: revisit score {score:.2f} < {options.overlap_min:.2f}"
        return Revisit(False, score, best, reason)
    if score < latest - _ROUNDING:
        reason = f"exploring: the latest latent shows more, {latest:.2f} > {score:.2f}"
        return Revisit(False, score, best, reason)
    return Revisit(True, score, best, f"revisits latent {best}, score {score:.2f}")
