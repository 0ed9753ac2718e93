"""Fit what a chunk takes to the chunks that were timed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable

import numpy as np

from lipass.calibration.frontier import Cost
from lipass.calibration.subject import Took
from lipass.errors import LipassError


def fit(chunks: Iterable[Took]) -> Cost:
    """Return the cost that lies nearest, in relative terms, to the medians of equal chunks.

    No part of a cost is negative, so of all choices of parts the one that fits best without is
    taken: a chunk that reads less must never be foreseen to take longer.

    Raises:
        LipassError: no chunk was timed without compiling in it.
    """
    groups: dict[tuple[int, int], list[float]] = {}
    for one in chunks:
        if not one.compiled:
            groups.setdefault((one.latents, one.steps), []).append(one.ms)
    if not groups:
        raise LipassError(
            "a calibration needs chunks in which nothing is compiled, got none; use more walks or "
            "longer ones, or see the receipt for what compiles again and again"
        )
    rows = np.array([[1.0, n, s, n * s] for n, s in groups])
    times = np.array([statistics.median(own) for own in groups.values()])
    weights = np.sqrt([len(own) for own in groups.values()]) / times
    best, least = None, np.inf
    for count in range(1, 5):
        for parts in itertools.combinations(range(4), count):
            found = np.linalg.lstsq(rows[:, parts] * weights[:, None], times * weights)[0]
            away = float(np.square((rows[:, parts] @ found - times) * weights).sum())
            if (found >= 0).all() and away < least * (1 - 1e-6):
                best, least = dict(zip(parts, found, strict=True)), away
    assert best is not None  # one part alone is positive, as times are
    return Cost(*(round(float(best.get(part, 0.0)), 6) for part in range(4)))
