"""Put results together: rows, means with their intervals, and what is kept of the dense model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lipass.quality.figures import METRICS
from lipass.quality.intervals import GROUPS_LEAST, bootstrap, mean
from lipass.quality.results import Entry
from lipass.quality.subject import Case
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
        for metric in entry.values
        if (value := _figure(entry, metric)) is not None
    ]


def summary(entries: Iterable[Entry], dense: str) -> list[dict[str, Any]]:
    """Give mean, interval and worst of each figure, by method and regime.

    Args:
        entries: results.
        dense: the method that others are compared with.

    Returns:
        For each method and regime a dict with `rollouts`, `verdicts` (how many of each), `metrics`
        (by name: `mean`, `low`, `high`, `worst`, and the `count` of rollouts that have the figure;
        the bounds are None where too little was drawn, the worst where a rollout broke and has no
        figure) and `kept` (by name: whether the mean lies within the interval of the dense model
        or on its better side; False where a rollout lacks what the dense one of its walk has; None
        where there is no interval).
    """
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.case.regime, entry.method), []).append(entry)
    metrics = {key: _metrics(group) for key, group in found.items()}
    beside = {one.case: one for group in found.values() for one in group if one.method == dense}
    return [
        {
            "method": method,
            "regime": regime,
            "rollouts": len(group),
            "verdicts": dict(Counter(entry.verdict for entry in group if entry.verdict)),
            "metrics": metrics[regime, method],
            "kept": {}
            if method == dense
            else _kept(group, metrics[regime, method], metrics.get((regime, dense), {}), beside),
        }
        for (regime, method), group in found.items()
    ]


def _figure(entry: Entry | None, metric: str) -> float | None:
    value = None if entry is None else entry.values.get(metric)
    return None if value is None or not math.isfinite(value) else float(value)


def is_broken_off(entry: Entry) -> bool:
    """Tell whether pictures of a rollout could not be compared with those of the dense model."""
    return entry.verdict is not None and _figure(entry, "psnr_vs_off_worst_db") is None


def _metrics(group: list[Entry]) -> dict[str, dict[str, float | None]]:
    """Mean, interval, worst and count of each figure of a group.

    Rooms are drawn as wholes where there are three; of fewer, walks.
    """
    by_room = _by_room(group)
    found = {}
    for metric in METRICS:
        all_of_it = [(entry, _figure(entry, metric)) for entry in group]
        known = [(entry.case, value) for entry, value in all_of_it if value is not None]
        if not known:
            continue
        values = [value for _, value in known]
        drawn = [case.room if by_room else case._replace(seed=0) for case, _ in known]
        low, high = bootstrap(values, drawn) or (None, None)
        worst = min(values) if METRICS[metric].better == "more" else max(values)
        lost = any(value is None and is_broken_off(entry) for entry, value in all_of_it)
        found[metric] = {
            "mean": mean(values),
            "low": low,
            "high": high,
            "worst": None if lost else worst,
            "count": len(values),
        }
    return found


def _kept(
    group: list[Entry],
    mine: dict[str, dict],
    dense: dict[str, dict],
    beside: dict[Case, Entry],
) -> dict[str, bool | None]:
    """Compare with the intervals of the dense model, where they are those of several rooms."""
    several = _by_room(group)
    found: dict[str, bool | None] = {}
    for metric in KEPT:
        if any(_is_lost(entry, metric, beside) for entry in group):
            found[metric] = False
        elif metric in mine and metric in dense:
            held = _is_kept(mine[metric]["mean"], dense[metric], METRICS[metric].better)
            found[metric] = held if several else None
    return found


def _is_lost(entry: Entry, metric: str, beside: dict[Case, Entry]) -> bool:
    """Whether a rollout lacks a figure that the dense one of its walk has."""
    wanted = _figure(beside.get(entry.case), metric)
    return wanted is not None and _figure(entry, metric) is None


def _by_room(group: list[Entry]) -> bool:
    return len({entry.case.room for entry in group}) >= GROUPS_LEAST


def _is_kept(value: float, dense: dict[str, Any], better: str) -> bool | None:
    if dense["low"] is None:
        return None
    return bool(value >= dense["low"] if better == "more" else value <= dense["high"])


def worst_verdict(verdicts: dict[str, int]) -> str:
    """Name the worst of the verdicts; "" where there are none."""
    return max(verdicts, key=lambda name: Verdict(name).rank) if verdicts else ""
