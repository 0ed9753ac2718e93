"""Render a report as plain text of at most 80 columns, without third-party packages."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from lipass.folding import folded, layer_kind, same_reason
from lipass.receipt_ending import ending
from lipass.receipt_points import points

if TYPE_CHECKING:
    from lipass.compile.graph_breaks import GraphBreak
    from lipass.receipt import ChunkRecord, PassRecord, Report, SiteRecord

_WIDTH = 80
_IN = " " * 4


def render(report: Report) -> str:
    """Give the whole report as text."""
    parts = [
        "\n".join(line for one in report.idle for line in textwrap.wrap(one, _WIDTH)),
        _summary(report),
        _left_eager(report.left_eager),
        _failures(report.passes),
        _graph_breaks(report.graph_breaks),
        *_models(report.sites.values()),
        _passes(report.passes),
        _chunks(report),
        "\n".join(line for one in points(report.chunks) for line in _wrapped(one, "")),
        "\n".join(textwrap.wrap(ending(report), _WIDTH)),
    ]
    return "\n\n".join(part for part in parts if part)


def _summary(report: Report) -> str:
    actions = Counter(site.action for site in report.sites.values())
    dense = sum(site.ran_dense for site in report.sites.values())
    what = f"{actions['rewritten']} rewritten, {actions['kept']} kept"
    lines = [
        f"graphs {report.graphs}, recompiled {report.recompiles}, "
        f"compile time {report.compile_s:.1f} s",
        f"attention sites: {what}" + (f"; {dense} ran dense in every call" if dense else ""),
    ]
    if report.invariants_computed:
        computed, kept = report.invariants_computed, report.invariants_kept
        lines.append(f"invariants: {computed} computed, {kept} kept")
    if report.invariants_untold:
        lines.append(
            f"invariants: {report.invariants_untold} computed in torch.inference_mode, where none "
            "can be kept; torch.no_grad() lets a session keep them"
        )
    return "\n".join(lines)


def _left_eager(places: Iterable[GraphBreak]) -> str:
    """Say in full what runs without any graph: nothing else in the receipt is about it."""
    lines = []
    for found in places:
        lines += _wrapped(f"not compiled: {found.source}", "")
        for text in (found.reason, f"remedy: {found.remedy}"):
            lines += _wrapped(text)
    return "\n".join(lines)


def _graph_breaks(breaks: Iterable[GraphBreak]) -> str:
    lines = []
    for found in breaks:
        lines.append(f"graph break at {found.source}")
        for text in (found.reason, f"remedy: {found.remedy}"):
            lines += _wrapped(text)
    return "\n".join(lines)


def _wrapped(text: str, indent: str = _IN) -> list[str]:
    """Give a sentence in full, on as many lines as it takes."""
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=_IN)


def _failures(passes: Iterable[PassRecord]) -> str:
    """One line for each failure: what happened to the graph, whom to ask, and why."""
    found = dict.fromkeys(
        f"without {record.name} (ask `lipass bisect`): {record.failure}"
        for record in passes
        if record.failure
    )
    return "\n".join(part for line in found for part in _wrapped(line, ""))


def _models(sites: Iterable[SiteRecord]) -> list[str]:
    """One table a model, under its name where there are several."""
    models: dict[str, list[SiteRecord]] = {}
    for site in sites:
        models.setdefault(site.model, []).append(site)
    if len(models) < 2:
        return [_sites(own) for own in models.values()]
    return [f"{name or 'model unknown'}\n{_sites(own)}" for name, own in models.items()]


def _sites(sites: Iterable[SiteRecord]) -> str:
    """One row for all layers of which the same is true, its reason on the lines below."""
    groups: dict[tuple[str, ...], list[SiteRecord]] = {}
    for site in sites:
        grid = "x".join(map(str, site.grid)) if site.grid else "?"
        action = "dense" if site.ran_dense else site.action
        key = (layer_kind(site.name), site.role, grid, action, site.provider)
        groups.setdefault((*key, same_reason(site.reason)), []).append(site)
    rows, reasons = [], []
    for (_, role, grid, action, provider, _), members in groups.items():
        name = folded([site.name for site in members])
        density = _range([site.density for site in members if site.density is not None])
        rows.append((name, str(len(members)), role, grid, action, density, provider))
        reasons.append("\n".join(_wrapped(members[0].reason + _moved(members))))
    head, *lines = _grid(("site", "n", "role", "grid", "action", "density", "by"), rows) or [""]
    body = [f"{line}\n{reason}" for line, reason in zip(lines, reasons, strict=True)]
    return "\n".join([head, *body])


def _moved(sites: Sequence[SiteRecord]) -> str:
    """Say what merging a history has done to scores, or nothing."""
    means, most = (
        [error for site in sites if (error := getattr(site, name)) is not None]
        for name in ("score_error", "score_error_max")
    )
    if not means:
        return ""
    return f"; scores moved by {max(means):.2g} (root mean square), by {max(most):.2g} at most"


def _range(densities: Sequence[float]) -> str:
    if not densities:
        return ""
    low, high = f"{min(densities):.2f}", f"{max(densities):.2f}"
    return low if low == high else f"{low}-{high}"


def _passes(passes: Iterable[PassRecord]) -> str:
    """One row for all runs of a pass, and below it what it did and refused, each once."""
    runs: dict[str, list[PassRecord]] = {}
    for record in passes:
        runs.setdefault(record.name, []).append(record)
    rows, notes = [], []
    for name, records in runs.items():
        changed = f"{sum(one.changed for one in records)}/{len(records)}"
        rows.append((name, changed, f"{sum(one.seconds for one in records):.2f}"))
        notes.append([line for text in _notes(records) for line in _wrapped(text)])
    head, *lines = _grid(("pass", "changed", "s"), rows) or [""]
    return "\n".join(
        [head, *("\n".join([row, *below]) for row, below in zip(lines, notes, strict=True))]
    )


def _notes(records: Iterable[PassRecord]) -> Iterator[str]:
    """Say what notes say of equal layers once; what was found stands with the sites."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for note in (note for record in records for note in record.notes):
        where, _, said = note.partition(": ")
        if not said.startswith("found, "):
            groups.setdefault((layer_kind(where), same_reason(said)), []).append((where, said))
    for told in groups.values():
        places = list(dict.fromkeys(where for where, _ in told))
        count = f" x{len(places)}" if len(places) > 1 else ""
        where, said = folded(places), told[0][1]
        yield f"{where}{count}: {said}" if said else where


def _chunks(report: Report) -> str:
    """One row a chunk, planned beside done, and why it may reuse steps on the line below."""
    chunks, forgotten, rows = report.chunks, report.chunks_forgotten, []
    for record in chunks:
        plan = record.plan
        context = f"{len(plan.context.indices)}/{plan.history_latents}"
        read = "" if record.latents_read is None else str(record.latents_read)
        window = "" if plan.context.window_chunks is None else str(plan.context.window_chunks)
        steps, reused = "", ""
        if plan.steps is not None:
            steps = f"{plan.steps.total - record.steps_skipped}/{plan.steps.total}"
            reused = f"{record.steps_skipped}/{len(plan.steps.reused)}"
        where, done = f"{record.session}.{plan.stream}", (str(record.lookups), str(record.misses))
        rows.append((where, str(plan.index), context, read, window, steps, reused, *done))
    head = ("session", "chunk", "context", "read", "window", "steps", "reused")
    lines = _grid((*head, "looked up", "missed"), rows)
    reasons = ["\n".join(_below(one, report)) for one in chunks]
    lines[1:] = [f"{a}\n{b}" for a, b in zip(lines[1:], reasons, strict=True)]
    if forgotten:
        lines.append(f"({forgotten} earlier chunks not shown)")
    return "\n".join(lines)


def _below(record: ChunkRecord, report: Report) -> list[str]:
    blend = record.plan.steering
    prompt = _wrapped(blend.said()) if blend is not None and blend.changes else []
    return [*prompt, *_wrapped(_why_steps(record, report)), *_wrapped(_grown(record))]


def _grown(record: ChunkRecord) -> str:
    """Say what was taken on half of the grid, if that was asked for."""
    steps = record.plan.steps
    if steps is None or steps.coarse is None:
        return ""
    taken, planned = record.coarse_steps, len(steps.coarse)
    short = f", {planned} were planned" if taken < planned else ""
    return f"{taken} of {steps.total} steps on half of the grid{short}"


def _why_steps(record: ChunkRecord, report: Report) -> str:
    """Say why steps may be reused, or why those that were planned to be were computed."""
    steps = record.plan.steps
    planned = len(steps.reused) if steps is not None else 0
    if record.steps_skipped >= planned:
        return record.plan.revisit.reason
    if record.why_missed:
        why = max(record.why_missed, key=lambda reason: record.why_missed[reason])
    else:
        why = _why_unguarded(report) or "no compiled call was in a reused step"
    return f"{planned - record.steps_skipped} of them computed all the same: {why}"


def _why_unguarded(report: Report) -> str:
    """Return why no call may be answered, as the latest graph has it, or nothing."""
    start = "call: kept, "
    for one in reversed(report.passes):
        for note in one.notes if one.name == "guard-steps" else ():
            if note.startswith(start):
                return note.removeprefix(start)
    if report.presets and all(one.name != "guard-steps" for one in report.passes):
        named = " and ".join(repr(preset) for preset in report.presets)
        return f"graphs of {named} answer none; compile with the options of the session"
    return ""


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns; the first gives way to the others, the last takes what is left."""
    if not rows:
        return []
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head) - 1)]
    last = min(max(len(row[-1]) for row in table), 24)
    others = sum(width + 2 for width in widths[1:]) + 2 + last
    widths[0] = min(widths[0], max(_WIDTH - others, 12))
    lines = []
    for row in table:
        cells = [_cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=False)]
        line = "  ".join(cells)
        lines.append(f"{line}  {_cut(row[-1], _WIDTH - len(line) - 2)}".rstrip())
    return lines


def _cut(text: str, width: int) -> str:
    """Shorten a name from the front, a sentence from the back."""
    if len(text) <= width:
        return text
    if " " not in text:
        return ".." + text[len(text) - max(width - 2, 0) :]
    return textwrap.shorten(text, max(width, 5), placeholder=" ..")
