"""Lay results out as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from lipass.quality.figures import METRICS
from lipass.quality.results import Entry
from lipass.quality.summary import is_broken_off
from lipass.quality.verdicts import MEANINGS, Verdict

# Groups of columns of the long table.
_GROUPS = {
    "Beside the dense model": (
        "psnr_vs_off_db", "psnr_vs_off_affected_db", "psnr_vs_off_worst_db", "ssim_vs_off",
        "latent_error_vs_off",
    ),
    "Beside the truth": (
        "psnr_vs_truth_db", "ssim_vs_truth", "photometric_db", "geometric_px", "followed",
    ),
    "Along the walk": ("loop_score", "drift_db", "drift_slope_db", "seam", "seam_worst"),
    "Cost": (
        "speedup_vs_off", "chunk_s_p50", "chunk_s_p95", "chunk_s_slope", "latency_s_p50",
        "latency_s_p95", "kv_bytes_peak", "context_latents_mean", "steps_per_chunk", "density",
        "kept_mass",
    ),
}  # fmt: skip


def page(
    title: str, where: str, found: list[dict[str, Any]], entries: Sequence[Entry], dense: str
) -> str:
    """Return the page.

    Args:
        title: what was evaluated.
        where: on what, in a line.
        found: of `summary.summary`.
        entries: the results, for their pictures.
        dense: the method that others are compared with.
    """
    style = (files(__package__) / "page.css").read_text(encoding="utf-8")
    body = "".join(
        [
            f'<header><p class="brand">lipass eval</p><h1>{escape(title)}</h1>'
            f'<p class="where">{escape(where)}</p></header>',
            _verdicts(found),
            *(_regime(regime, found) for regime in _regimes(found)),
            _pictures(entries, dense),
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)} - lipass eval</title><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>"
    )


def _regimes(found: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(one["regime"] for one in found))


def _verdicts(found: list[dict[str, Any]]) -> str:
    """How many walks each method left unchanged, changed or broke, by regime."""
    names = [verdict.value for verdict in Verdict]
    lines = []
    for one in found:
        total = sum(one["verdicts"].values())
        if not total:
            continue
        parts = "".join(
            f'<i class="{_class(name)}" style="width:{100 * count / total:.1f}%" '
            f'title="{count} {name}"></i>'
            for name in names
            if (count := one["verdicts"].get(name, 0))
        )
        said = ", ".join(f"{one['verdicts'][n]} {n}" for n in names if n in one["verdicts"])
        lines.append(
            f"<tr><th>{escape(one['method'])}</th><td>{escape(one['regime'])}</td>"
            f'<td class="wide"><span class="meter">{parts}</span></td><td>{said}</td></tr>'
        )
    meanings = "".join(
        f'<li><i class="{_class(verdict.value)}"></i><b>{verdict.value}</b> {escape(meaning)}</li>'
        for verdict, meaning in MEANINGS.items()
    )
    return (
        "<section><h2>Verdicts</h2><p>Of walks, beside those of the dense model.</p>"
        f'<ul class="legend">{meanings}</ul><div class="scroll"><table><tbody>'
        f"{''.join(lines)}</tbody></table></div></section>"
    )


def _class(verdict: str) -> str:
    return verdict.replace(" ", "-")


def _regime(regime: str, found: list[dict[str, Any]]) -> str:
    group = [one for one in found if one["regime"] == regime]
    parts = [
        f"<section><h2>{escape(regime.capitalize())}</h2><p>Means over "
        f"{max(one['rollouts'] for one in group)} walks, with 95 % intervals where there are "
        "enough, and the worst walk below.</p>"
    ]
    for title, metrics in _GROUPS.items():
        shown = [m for m in metrics if any(m in one["metrics"] for one in group)]
        if shown:
            parts.append(_table(title, shown, group))
    return "".join([*parts, "</section>"])


def _table(title: str, metrics: list[str], group: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{escape(METRICS[metric].title)}</th>" for metric in metrics)
    lines = "".join(
        f"<tr><th>{escape(one['method'])}</th>{_cells(metrics, one)}</tr>" for one in group
    )
    return (
        f'<h3>{title}</h3><div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cells(metrics: list[str], one: dict[str, Any]) -> str:
    return "".join(
        _cell(metric, one["metrics"].get(metric), one["kept"], one["rollouts"])
        for metric in metrics
    )


def _cell(
    metric: str,
    figures: Mapping[str, float | None] | None,
    kept: Mapping[str, bool | None],
    rollouts: int,
) -> str:
    lost = ' class="lost" title="not within the interval of the dense model in all walks"'
    mark = lost if kept.get(metric) is False else ""
    if figures is None:
        return f"<td{mark}>{'broken' if mark else ''}</td>"
    shown = METRICS[metric]

    def told(key: str) -> str:
        value = figures[key]
        return "" if value is None else f"{value * shown.scale:,.{shown.digits}f}"

    small = [] if figures["count"] == rollouts else [f"of {figures['count']} walks"]
    if shown.better and figures["low"] is not None:
        small.append(f"{told('low')} to {told('high')}")
    if shown.better:
        small.append(f"worst {told('worst') or 'broken'}")
    return f"<td{mark}>{told('mean')}<small>{'<br>'.join(small)}</small></td>"


def _pictures(entries: Sequence[Entry], dense: str) -> str:
    """The worst and a typical walk of each method, with its worst frame and one in the middle."""
    parts = [
        "<section><h2>Worst and typical walks</h2><p>Of each method the walk with the worst "
        "chunk, and the one in the middle of all. Columns: the truth, the dense model, the "
        "method; the upper row is the frame of the worst chunk that is furthest from the dense "
        "model, the lower one that in the middle. Of the dense model: from the truth.</p>"
    ]
    for method in dict.fromkeys(entry.method for entry in entries):
        key = "psnr_vs_truth_db" if method == dense else "psnr_vs_off_worst_db"
        mine = [one for one in entries if one.method == method]
        own = [one for one in mine if one.shown]
        own = sorted(own, key=lambda one: one.values.get(key) or 0.0)
        broken = [str(one.case) for one in mine if is_broken_off(one)]
        if own or broken:
            parts.append(f"<h3>{escape(method)}</h3>")
        if broken:
            parts.append(
                "<p>Worse than any that is shown, with values that are no numbers or out of "
                f"range: {escape('; '.join(broken))}.</p>"
            )
        if own:
            chosen = {"worst": own[0], "typical": own[len(own) // 2]}
            parts.append(f'<div class="pictures">{"".join(_figures(chosen, key))}</div>')
    return "".join([*parts, "</section>"])


def _figures(chosen: Mapping[str, Entry], key: str) -> Iterator[str]:
    for kind, entry in chosen.items():
        said = f", {entry.verdict}" if entry.verdict else ""
        value = entry.values.get(key)
        figure = "" if value is None else f", {METRICS[key].title} {value:.1f}"
        yield (
            f'<figure><img src="{entry.shown}" alt="{escape(f"{kind}: {entry.case}")}">'
            f"<figcaption><b>{kind}</b> {escape(str(entry.case))}{said}{figure}</figcaption>"
            "</figure>"
        )
