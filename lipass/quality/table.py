"""Print a summary on a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from lipass.quality.figures import METRICS
from lipass.quality.summary import worst_verdict

# Head, metric, and whether the worst of it is shown in place of the mean.
_COLUMNS = (
    ("speed", "speedup_vs_off", False),
    ("~off", "psnr_vs_off_db", False),
    ("worst", "psnr_vs_off_worst_db", True),
    ("ssim", "ssim_vs_off", False),
    ("truth", "psnr_vs_truth_db", False),
    ("loop", "loop_score", False),
    ("drift", "drift_db", False),
    ("seam", "seam", False),
)
_LEGEND = (
    "Means over walks; ~off: PSNR in dB to the dense model, worst: its worst chunk,",
    "truth: to the renderer, loop: gated, drift: largest loss of a segment in dB,",
    "seam: jump where chunks begin. The verdict is that of the worst walk.",
)
_SHORT = {
    "drift_db": "drift",
    "drift_slope_db": "slope",
    "seam": "seams",
    "seam_worst": "worst seam",
    "loop_score": "loop",
}
_METHOD, _VERDICT, _CELL = 19, 10, 5


def table(found: list[dict[str, Any]], dense: str) -> str:
    """Return the table: a block a regime, a line a method, and what is kept of the dense model."""
    lines = []
    for regime in dict.fromkeys(one["regime"] for one in found):
        group = [one for one in found if one["regime"] == regime]
        lines.append(f"{regime}, {max(one['rollouts'] for one in group)} walks")
        head = " ".join(title.rjust(_CELL) for title, *_ in _COLUMNS)
        lines.append(f"{'method':{_METHOD}} {'verdict':{_VERDICT}} {head}")
        lines.append("-" * len(lines[-1]))
        lines += [_line(one) for one in group]
        lines += [told for one in group if (told := _broken_off(one))]
        lines += [*_kept(group, dense), ""]
    return "\n".join([*lines, *_LEGEND])


def _line(one: dict[str, Any]) -> str:
    cells = " ".join(_cell(one, metric, worst) for _, metric, worst in _COLUMNS)
    said = worst_verdict(one["verdicts"])
    return f"{one['method'][:_METHOD]:{_METHOD}} {said:{_VERDICT}} {cells}".rstrip()


def _cell(one: dict[str, Any], metric: str, worst: bool) -> str:
    value = one["metrics"].get(metric, {}).get("worst" if worst else "mean")
    if value is None:
        return "-".rjust(_CELL)
    shown = METRICS[metric]
    return f"{value * shown.scale:.{shown.digits}f}".rjust(_CELL)


def _broken_off(one: dict[str, Any]) -> str:
    """Say of how many walks the means are, where pictures of others could not be compared."""
    count = one["metrics"].get("psnr_vs_off_worst_db", {}).get("count", 0)
    if not one["verdicts"] or count == one["rollouts"]:
        return ""
    return (
        f"{one['method']}: of {count} of {one['rollouts']} walks, others have values out of range"
    )


def _kept(group: list[dict[str, Any]], dense: str) -> list[str]:
    """Say which methods are as good along a walk as the dense model, where intervals tell."""
    known = [one for one in group if any(kept is not None for kept in one["kept"].values())]
    if not known:
        return []
    lines = [f"Along the walk within the 95 % interval of {dense}, or better:"]
    for one in known:
        lost = [_SHORT[metric] for metric, kept in one["kept"].items() if kept is False]
        held = [_SHORT[metric] for metric, kept in one["kept"].items() if kept]
        told = ", ".join(held) or "nothing"
        lines.append(f"  {one['method']}: {told}" + (f"; not: {', '.join(lost)}" * bool(lost)))
    return lines
