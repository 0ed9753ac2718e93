"""Put results together: rows, means with their intervals, and what is kept of the dense model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lipass.quality.figures import METRICS
from lipass.quality.intervals import GROUPS_LEAST, bootstrap, mean
from lipass.quality.results import Entry
from lipass.quality.verdicts import Verdict

# What a walk shows, and pictures do not: a method is to be as good as the dense model in these.
KEPT = ("drift_db", "drift_slope_db", "seam", "seam_worst", "loop_score")


def rows(entries: Iterable[Entry], model: str) -> list[dict[str, Any]]:
    """Give one row a figure; figures that a rollout does not have are left out."""
    return [
        {
            "method": entry.method,
            "model": model,
            **entry.case._asdict(),
            "metric": metric,
            "value": value,
        }
        for entry in entries
        for metric, value in entry.values.items()
        if value is not None and math.isfinite(value)
    ]


def summary(entries: Iterable[Entry], dense: str) -> list[dict[str, Any]]:
    """Give mean, interval and worst of each figure, by method and regime.

    Args:
        entries: results.
        dense: the method that others are compared with.

    Returns:
        For each method and regime a dict with `rollouts`, `verdicts` (how many of each), `metrics`
        (by name: `mean`, `low`, `high`, `worst`; the bounds are None where too little was drawn)
        and `kept` (by name: whether the mean lies within the interval of the dense model or on its
        better side; None where there is no interval).
    """
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.case.regime, entry.method), []).append(entry)
    metrics = {key: _metrics(group) for key, group in found.items()}
    return [
        {
            "method": method,
            "regime": regime,
            "rollouts": len(group),
            "verdicts": dict(Counter(entry.verdict for entry in group if entry.verdict)),
            "metrics": metrics[regime, method],
            "kept": {}
            if method == dense
            else _kept(group, metrics[regime, method], metrics.get((regime, dense), {})),
        }
        for (regime, method), group in found.items()
    ]


def _metrics(group: list[Entry]) -> dict[str, dict[str, float | None]]:
    """Mean, interval and worst of each figure of a group.

    Rooms are drawn as wholes where there are three; of fewer, walks.
    """
    by_room = _by_room(group)
    found = {}
    for metric in METRICS:
        known = [entry for entry in group if entry.values.get(metric) is not None]
        if not known:
            continue
        values = [float(entry.values[metric]) for entry in known]  # type: ignore[arg-type]
        drawn = [entry.case.room if by_room else entry.case._replace(seed=0) for entry in known]
        low, high = bootstrap(values, drawn) or (None, None)
        worst = min(values) if METRICS[metric].better == "more" else max(values)
        found[metric] = {"mean": mean(values), "low": low, "high": high, "worst": worst}
    return found


def _kept(
    group: list[Entry], mine: dict[str, dict], dense: dict[str, dict]
) -> dict[str, bool | None]:
    """Compare with the intervals of the dense model, where they are those of several rooms."""
    several = _by_room(group)
    return {
        metric: _is_kept(mine[metric]["mean"], dense[metric], METRICS[metric].better)
        if several
        else None
        for metric in KEPT
        if metric in mine and metric in dense
    }


def _by_room(group: list[Entry]) -> bool:
    return len({entry.case.room for entry in group}) >= GROUPS_LEAST


def _is_kept(value: float, dense: dict[str, Any], better: str) -> bool | None:
    if dense["low"] is None:
        return None
    return bool(value >= dense["low"] if better == "more" else value <= dense["high"])


def worst_verdict(verdicts: dict[str, int]) -> str:
    """Name the worst of the verdicts; "" where there are none."""
    return max(verdicts, key=lambda name: Verdict(name).rank) if verdicts else ""
