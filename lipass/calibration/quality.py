"""Compare what was generated with what the dense model makes of the same walk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from lipass.errors import LipassError

_CAP_DB = 100.0


class Reference:
    """The dense model's results by walk.

    dB are of the peak of the signal: 1 for pictures in 0..1, otherwise the range of all values.
    """

    def __init__(self, outputs: Mapping[str, Tensor]) -> None:
        self._outputs = dict(outputs)
        low = min(float(one.min()) for one in outputs.values())
        high = max(float(one.max()) for one in outputs.values())
        if not math.isfinite(high - low):
            raise LipassError(
                f"the dense model must make finite results, got values from {low} to {high}; mend "
                "the rollout before it is calibrated"
            )
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

    def db(self, errors: Iterable[float]) -> float:
        """Give mean squared errors as dB, averaged before the logarithm; equal ones give 100."""
        own = list(errors)
        error = sum(own) / len(own)
        if not error > 0:
            return _CAP_DB if error == 0 else -_CAP_DB
        return min(_CAP_DB, 10 * math.log10(self.peak**2 / error))
