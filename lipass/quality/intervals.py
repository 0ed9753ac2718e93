"""Say how far a mean would be elsewhere, had other rooms been drawn."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Sequence

import torch

_DRAWS, _SEED = 2000, 0
COVERAGE = 0.95
GROUPS_LEAST = 3


def bootstrap(
    values: Sequence[float], groups: Sequence[Hashable] | None = None
) -> tuple[float, float] | None:
    """Interval of a mean by the percentile bootstrap, 95 %.

    Source: Efron, Tibshirani 1993. Groups are drawn as wholes: walks through one room are no
    independent draws.

    Args:
        values: figures.
        groups: whose each is, such as its room; without, each is one of its own.

    Returns:
        Low and high; None for fewer than three groups, of which nothing can be said.
    """
    keys = list(range(len(values))) if groups is None else list(groups)
    names = list(dict.fromkeys(keys))
    if len(names) < GROUPS_LEAST:
        return None
    by_group = [[v for v, key in zip(values, keys, strict=True) if key == name] for name in names]
    sums = torch.tensor([sum(group) for group in by_group], dtype=torch.float64)
    counts = torch.tensor([len(group) for group in by_group], dtype=torch.float64)
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(len(names), (_DRAWS, len(names)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - COVERAGE) / 2
    return float(means.quantile(tail)), float(means.quantile(1 - tail))


def percentile(values: Sequence[float], share: float) -> float:
    """Percentile of figures, between neighbours; `share` in 0..1."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def mean(values: Sequence[float]) -> float:
    """Mean of figures."""
    return statistics.fmean(values)
