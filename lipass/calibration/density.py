"""Find out whether block-sparse attention is worth it, and at which budget.

Budgets are compiled in, so they are no matter of points: one is chosen for all of them, where the
history is longest and attention has most to leave out. It has to pay there: to be faster than
dense attention by more than timing is sure of, at hardly any loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lipass.kernels import registry

# Less than this share of time saved is no gain that is worth a compilation.
_GAIN = 1.05
_LOSS_DB = 1.0
_ROUNDS = 3


@dataclass(frozen=True)
class Density:
    """What one way to attend did.

    Attributes:
        label: of it.
        options: flat ones.
        visited: share of the key blocks that were visited.
        speedup: over dense attention, all else alike.
        db: to the dense model, mean over walks.
    """

    label: str
    options: Mapping[str, Any]
    visited: float
    speedup: float
    db: float

    def to_dict(self) -> dict[str, Any]:
        """Give plain data."""
        return asdict(self)


def ways(options: Mapping[str, Any], budget: float) -> dict[str, dict[str, Any]]:
    """List what is tried beside each other, as all of the shared options.

    Args:
        options: that all points share.
        budget: of decode that they ask for.
    """
    found = {"dense attention": dense(options)}
    for share in (min(1.5 * budget, 0.9), budget, 0.5 * budget):
        found[f"budget {share:.2g}"] = {**options, "sparse.budget": round(share, 4)}
    return found


def dense(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with dense attention."""
    without = {key: value for key, value in options.items() if not key.startswith("sparse")}
    return {**without, "sparse": False}


def is_told(options: Mapping[str, Any]) -> bool:
    """Whether somebody has decided already."""
    return any(key == "sparse" or key.startswith("sparse.budget") for key in options)


def measured(
    tried: Mapping[str, Mapping[str, Any]],
    walks: Sequence[str],
    attempt: Callable[[str, str], tuple[float, float, float]],
) -> list[Density]:
    """Try all ways in turn, walk by walk; the first round compiles and is not timed.

    Args:
        tried: options by label, dense attention first.
        walks: names of walks.
        attempt: time in ms, dB and share of visited blocks of a way on a walk.
    """
    took: dict[str, list[float]] = {label: [] for label in tried}
    dbs: dict[str, list[float]] = {label: [] for label in tried}
    shares: dict[str, float] = {}
    for number in range(_ROUNDS):
        for walk in walks:
            for label in tried:
                ms, db, shares[label] = attempt(label, walk)
                if number:
                    took[label].append(ms)
                else:
                    dbs[label].append(db)
    dense = took[next(iter(tried))]
    return [
        Density(
            label,
            options,
            round(shares[label], 4),
            round(statistics.median(a / b for a, b in zip(dense, took[label], strict=True)), 3),
            round(statistics.mean(dbs[label]), 2),
        )
        for label, options in tried.items()
    ]


def visited() -> float:
    """Return the share of key blocks that calls have visited since counts were reset."""
    counts = registry.telemetry().values()
    total = sum(one.total_blocks for one in counts)
    return sum(one.visited_blocks for one in counts) / total if total else 1.0


def chosen(found: Sequence[Density]) -> Density:
    """Return what pays: the fastest of those that lose little, or dense attention, the first."""
    dense = found[0]
    worth = [
        one
        for one in found[1:]
        if one.speedup >= _GAIN and one.visited < 1 and one.db >= dense.db - _LOSS_DB
    ]
    return max(worth, key=lambda one: one.speedup, default=dense)
