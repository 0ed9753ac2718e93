"""Figures of a visit, over its latest chunks: rates, latency, distance between both sides."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from lipass.play.world import Pixels

_LATEST = 24
_CAP_DB = 100.0


class Rate:
    """How fast one side is: what its chunks take, and what reaches the visitor.

    Args:
        frames: of a chunk.
        clock: seconds.
    """

    def __init__(self, frames: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._frames, self._clock = frames, clock
        self._seconds: deque[float] = deque(maxlen=_LATEST)
        self._shown: deque[float] = deque(maxlen=_LATEST)

    def add(self, seconds: float) -> None:
        """Note a chunk that took so long."""
        self._seconds.append(seconds)
        self._shown.append(self._clock())

    @property
    def own_fps(self) -> float | None:
        """Frames a second that the median chunk gives if nothing else is waited for."""
        if not self._seconds:
            return None
        return self._frames / statistics.median(self._seconds)

    def shown_fps(self, still: bool) -> float | None:
        """Frames a second that came out in fact; None where nobody moved or too few came.

        Args:
            still: whether the visitor stands still, so that no chunk is wanted.
        """
        if still or len(self._shown) < 3:
            return None
        gaps = np.diff(np.asarray(self._shown))
        return float(self._frames / np.median(gaps))


def distance_db(one: Pixels, other: Pixels) -> float:
    """PSNR between two chunks of frames; equal ones give 100."""
    error = float(np.square(one.astype(np.float32) - other).mean()) / 255**2
    return _CAP_DB if error == 0 else min(_CAP_DB, -10 * math.log10(error))
