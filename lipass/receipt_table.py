"""Render a report as plain text of at most 80 columns, without third-party packages."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lipass.receipt import ChunkRecord, PassRecord, Report, SiteRecord

_WIDTH = 80


def render(report: Report) -> str:
    """Give the whole report as text."""
    parts = [
        _summary(report),
        _sites(report.sites.values()),
        _passes(report.passes),
        _chunks(report.chunks, report.chunks_forgotten),
    ]
    return "\n\n".join(part for part in parts if part)


def _summary(report: Report) -> str:
    actions = Counter(site.action for site in report.sites.values())
    lines = [
        f"graphs {report.graphs}, recompiled {report.recompiles}, "
        f"compile time {report.compile_s:.1f} s",
        f"attention sites: {actions['rewritten']} rewritten, {actions['kept']} kept",
    ]
    return "\n".join(lines)


def _sites(sites: Iterable[SiteRecord]) -> str:
    rows = []
    for site in sites:
        grid = "x".join(map(str, site.grid)) if site.grid else "?"
        density = "" if site.density is None else f"{site.density:.2f}"
        rows.append((site.name, site.role, grid, site.action, density, site.provider, site.reason))
    return _grid(("site", "role", "grid", "action", "dens", "provider", "reason"), rows)


def _passes(passes: Iterable[PassRecord]) -> str:
    rows = []
    for record in passes:
        notes = f"{len(record.notes)}: {record.notes[0]}" if record.notes else ""
        changed = "yes" if record.changed else "no"
        rows.append((record.name, changed, f"{record.seconds:.2f}", notes))
    return _grid(("pass", "changed", "s", "notes"), rows)


def _chunks(chunks: Sequence[ChunkRecord], forgotten: int) -> str:
    rows = []
    for record in chunks:
        plan = record.plan
        kept = f"{len(plan.context.indices)}/{plan.history_latents}"
        window = "" if plan.context.window_chunks is None else str(plan.context.window_chunks)
        steps = "" if plan.steps is None else f"{len(plan.steps.computed)}/{plan.steps.total}"
        where = f"{record.session}.{plan.stream}"
        rows.append((where, str(plan.index), kept, window, steps, plan.revisit.reason))
    text = _grid(("session", "chunk", "context", "window", "steps", "revisit"), rows)
    return text + (f"\n({forgotten} earlier chunks not shown)" if forgotten else "")


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns; the last one takes what is left of the line and is cut there."""
    if not rows:
        return ""
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head) - 1)]
    # Names are the only long cells: the first column gives way so that the reason stays readable.
    spare = _WIDTH - 24 - sum(width + 2 for width in widths[1:]) - 2
    widths[0] = min(widths[0], max(spare, 12))
    lines = []
    for row in table:
        cells = [_cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=False)]
        line = "  ".join(cells)
        lines.append(f"{line}  {_cut(row[-1], _WIDTH - len(line) - 2)}".rstrip())
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    """Shorten from the front where a dotted name, from the back otherwise."""
    if len(text) <= width:
        return text
    if " " not in text and width > 2:
        return ".." + text[-(width - 2) :]
    return textwrap.shorten(text, max(width, 5), placeholder=" ..")
