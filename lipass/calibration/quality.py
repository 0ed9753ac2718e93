"""Compare what was generated with what the dense model makes of the same walk."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lipass.errors import LipassError

# Walks on which a choice changes nothing must not make up for those on which it does.
MOST_DB = 60.0


class Reference:
    """The dense model's results by walk.

    dB are of the peak of the signal: 1 for pictures in 0..1, otherwise the range of all values.
    """

    def __init__(self, outputs: Mapping[str, Tensor]) -> None:
        self._outputs = dict(outputs)
        ends = {walk: (float(one.min()), float(one.max())) for walk, one in outputs.items()}
        for walk, (low, high) in ends.items():
            if not math.isfinite(high - low):  # NaN would be lost among ends of other walks
                raise LipassError(
                    f"the dense model must make finite results, got values from {low} to {high} "
                    f"on {walk!r}; mend the rollout before it is calibrated"
                )
        low, high = min(low for low, _ in ends.values()), max(high for _, high in ends.values())
        self.peak = 1.0 if low >= -0.01 and 0.5 < high <= 1.01 else (high - low) or 1.0

    def error(self, walk: str, output: Tensor) -> float:
        """Mean squared difference from the dense result of a walk.

        Raises:
            LipassError: another shape: then frames are not those of the same places.
        """
        dense = self._outputs[walk]
        if output.shape != dense.shape:
            raise LipassError(
                f"rollouts of one walk must have one shape, got {list(output.shape)} for "
                f"{list(dense.shape)} on {walk!r}; return as much whatever the session decides"
            )
        return float((output - dense).square().mean())

    def db(self, error: float) -> float:
        """Give a mean squared error as dB; nobody sees what is above 60."""
        if not 0 < error < math.inf:  # what overflows is as far as what is no number
            return MOST_DB if error == 0 else -MOST_DB
        return max(-MOST_DB, min(MOST_DB, 10 * math.log10(self.peak**2 / error)))
