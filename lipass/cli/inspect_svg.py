"""Draw the graphs of an inspected target: inputs, layers by their work, sites, steps, cameras."""

from __future__ import annotations

import itertools
from html import escape
from importlib.resources import files
from typing import Any

from lipass.cli.inspect_table import shape, work

_WIDTH, _MARGIN, _ROW, _BAR = 960, 24, 26, 12
_NAME_X, _BAR_X, _BAR_WIDTH, _NOTE_X = 92, 310, 390, 722
_CHIP_HEIGHT, _CHARACTER = 24, 6.7  # of a monospaced font at 11 px
# More rows than this are folded where layers are equal.
_ROWS_SHOWN = 8
# Layers with less work than this share of the largest one are drawn together.
_SMALL = 0.01
_LEGEND = (
    ("linear", "matrix products"),
    ("rewritten", "attention, rewritten"),
    ("saved", "predicted to be saved"),
    ("kept", "attention, kept"),
    ("step", "denoising step"),
    ("pose", "cameras and who reads them"),
)


def picture(document: dict[str, Any], *, alone: bool = False) -> str:
    """Return all graphs as one SVG.

    Args:
        document: of `lipass inspect --json`.
        alone: bring the colours along, for a file that stands alone.
    """
    y = float(_MARGIN)
    parts = []
    for graph in document["graphs"]:
        part, y = _graph(document, graph, y)
        parts.append(part)
        y += 30
    legend, y = _legend(y)
    style = ""
    if alone:
        css = (files(__package__) / "picture.css").read_text(encoding="utf-8")
        style = f"<style>{css}</style>"
    return (
        f'<svg class="picture" xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" '
        f'height="{y:.0f}" viewBox="0 0 {_WIDTH} {y:.0f}" role="img" '
        f'aria-label="graphs of {escape(document["target"])}">{style}'
        f'<rect class="ground" width="100%" height="100%"/>{"".join(parts)}{legend}</svg>'
    )


def _graph(document: dict[str, Any], graph: dict[str, Any], y: float) -> tuple[str, float]:
    def own(key: str) -> list[dict[str, Any]]:
        return [entry for entry in document[key] if entry["graph"] == graph["graph"]]

    sites = {site["name"]: site for site in own("sites")}
    cameras = {pose["input"] for pose in own("poses")}
    parts = [_text(_MARGIN, y + 14, f"graph {graph['graph']}", "title")]
    parts.append(_text(_MARGIN + 78, y + 14, _summary(graph, len(sites)), "soft"))
    chips, camera, bottom = _inputs(graph["inputs"], cameras, y + 30)
    parts.append(chips)
    y = bottom + 20
    rows = _fold(graph["layers"], sites)
    most = max((row["flops"] for row in rows), default=0) or 1
    readers = _camera_readers(own("passes")) if camera else set()
    read_at = []
    for step, group in itertools.groupby(rows, key=lambda row: row["step"]):
        members = list(group)
        if step is not None:
            parts.append(_step(y, step, len(members)))
        for row in members:
            parts.append(_layer(row, sites, y, most))
            if any(name in readers for name in row["sites"]):
                read_at.append(y + _ROW / 2)
            y += _ROW
        y += 8 if step is not None else 0
    if camera and read_at:
        parts.append(_rail(camera, read_at))
    return "".join(parts), y


def _summary(graph: dict[str, Any], sites: int) -> str:
    told = f"{graph['nodes']:,} nodes, {sites} attention sites"
    if graph["flops"]:
        told += f", {work(graph['flops'])}"
    if graph["flops_after"] < graph["flops"]:
        told += f" before and {work(graph['flops_after'])} after"
    return told


def _inputs(
    inputs: list[dict[str, Any]], cameras: set[str], y: float
) -> tuple[str, tuple[float, float] | None, float]:
    """Draw a chip an input; long lists of equal shapes, such as caches, are one chip."""
    x, parts, camera = float(_NAME_X), [], None
    # Cameras first, so that their way to the layers crosses nothing.
    for name, size, count in sorted(_alike(inputs), key=lambda chip: chip[0] not in cameras):
        label = f"{_short(name)} {size}" + (f"  x{count}" if count > 1 else "")
        width = len(label) * _CHARACTER + 18
        if x + width > _WIDTH - _MARGIN:
            x, y = float(_NAME_X), y + _CHIP_HEIGHT + 6
        kind = "pose" if name in cameras else "input"
        parts.append(
            f'<rect class="chip {kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{_CHIP_HEIGHT}" rx="6"/>' + _text(x + 9, y + 16, label, f"mono {kind}")
        )
        if kind == "pose":
            camera = (x, y + _CHIP_HEIGHT / 2)
        x += width + 8
    return "".join(parts), camera, y + _CHIP_HEIGHT


def _alike(inputs: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    groups: dict[str, list[str]] = {}
    for given in inputs:
        size = shape(given["shape"])
        if given["name"] == "parameters":
            size = f"{given['shape'][0]:,}"
        groups.setdefault(size, []).append(given["name"])
    return [(names[0], size, len(names)) for size, names in groups.items()]


def _short(name: str) -> str:
    name = name.removeprefix("l_").strip("_")
    return name if len(name) <= 18 else name[:16] + ".."


def _fold(layers: list[dict[str, Any]], sites: dict[str, dict]) -> list[dict[str, Any]]:
    """Leave out layers without work; draw small neighbours together, and equal ones if many."""
    most = max((layer["flops"] for layer in layers), default=0)
    rows: list[dict[str, Any]] = []
    for layer in layers:
        if not layer["flops"] and not layer["sites"]:
            continue
        small = layer["flops"] < _SMALL * most and not layer["sites"]
        if small and rows and rows[-1]["small"] and rows[-1]["step"] == layer["step"]:
            _merge(rows[-1], layer)
            continue
        rows.append({**layer, "count": 1, "last": layer["name"], "small": small})
    if len(rows) <= _ROWS_SHOWN:
        return rows
    folded: list[dict[str, Any]] = []
    for row in rows:
        if folded and _key(folded[-1], sites) == _key(row, sites):
            folded[-1]["count"] += 1
            folded[-1]["last"] = row["name"]
            folded[-1]["sites"] = folded[-1]["sites"] + row["sites"]
        else:
            folded.append(row)
    return folded


def _merge(row: dict[str, Any], layer: dict[str, Any]) -> None:
    row["last"] = layer["name"]
    row["flops"] += layer["flops"]
    row["nodes"] += layer["nodes"]


def _key(row: dict[str, Any], sites: dict[str, dict]) -> tuple[Any, ...]:
    told = {
        (site["role"], site["action"], site["reason"])
        for site in (sites[name] for name in row["sites"])
    }
    return row["step"], row["flops"], row["nodes"], frozenset(told)


def _layer(row: dict[str, Any], sites: dict[str, dict], y: float, most: int) -> str:
    name = row["name"] if row["name"] == row["last"] else f"{row['name']} .. {row['last']}"
    own = [sites[name] for name in row["sites"]]
    bar_y = y + (_ROW - _BAR) / 2
    scale = _BAR_WIDTH / most
    parts = [f'<g class="layer"><title>{escape(_tooltip(row, own))}</title>']
    parts.append(f'<rect class="hit" x="{_NAME_X - 8}" y="{y}" width="860" height="{_ROW}"/>')
    parts.append(_text(_NAME_X, y + 17, _tail(name, 27), "mono"))
    if row["count"] > 1:
        parts.append(_text(_BAR_X - 8, y + 17, f"x{row['count']}", "mono soft end"))
    x = float(_BAR_X)
    linear = (row["flops"] - row["attention_flops"]) * scale
    for kind, length in [("linear", linear), *_attention(own, row["count"], scale)]:
        if length > 0.05:
            parts.append(
                f'<rect class="bar {kind}" x="{x:.1f}" y="{bar_y:.1f}" '
                f'width="{max(length, 1):.1f}" height="{_BAR}"/>'
            )
            x += max(length, 1)
    if own:
        parts.append(
            f'<circle class="{_colour(own)}" cx="{_NOTE_X}" cy="{y + _ROW / 2}" r="4.5"/>'
        )
        parts.append(_text(_NOTE_X + 12, y + 17, _note(own), "mono soft"))
    return "".join([*parts, "</g>"])


def _attention(own: list[dict], count: int, scale: float) -> list[tuple[str, float]]:
    pieces = []
    for site in own[: len(own) // count]:
        whole = site["flops"] * scale
        if site["action"] != "rewritten":
            pieces.append(("kept", whole))
            continue
        density = 1.0 if site["density"] is None else site["density"]
        pieces += [("rewritten", whole * density), ("saved", whole * (1 - density))]
    return pieces


def _colour(own: list[dict]) -> str:
    return "rewritten" if any(site["action"] == "rewritten" for site in own) else "kept"


def _note(own: list[dict]) -> str:
    site = own[0]
    roles = " + ".join(dict.fromkeys(one["role"] for one in own))
    density = f" {site['density']:.0%} by {site['provider']}" if site["density"] else ""
    return f"{roles}{density}" if site["action"] == "rewritten" else f"{roles}, {site['action']}"


def _tooltip(row: dict[str, Any], own: list[dict]) -> str:
    told = f"{row['name']}: {row['nodes']} nodes, {work(row['flops'])}"
    return "\n".join([told, *(f"{s['name']} {s['action']}: {s['reason']}" for s in own)])


def _tail(name: str, length: int) -> str:
    return name if len(name) <= length else ".." + name[-length + 2 :]


def _step(y: float, step: int, rows: int) -> str:
    height = rows * _ROW
    return (
        f'<rect class="band" x="{_NAME_X - 14}" y="{y}" width="{_WIDTH - _NAME_X - 10}" '
        f'height="{height}" rx="6"/>'
        f'<rect class="bracket" x="{_NAME_X - 14}" y="{y}" width="3" height="{height}" rx="1.5"/>'
        + _text(_NAME_X - 20, y + height / 2 + 4, f"step {step}", "step end")
    )


def _camera_readers(passes: list[dict]) -> set[str]:
    from lipass.passes.core import pass_class

    reads = [one for one in passes if pass_class(one["name"]).section == "context"]
    return {n["site"] for one in reads for n in one["notes"] if n["action"] == "rewritten"}


def _rail(camera: tuple[float, float], read_at: list[float]) -> str:
    """Draw the way of the cameras: down the left edge, with a dot where they are read."""
    x, (chip_x, chip_y) = _MARGIN - 10, camera
    dots = "".join(
        f'<path class="rail" d="M {x} {y} H {x + 8}"/>'
        f'<circle class="pose" cx="{x + 9}" cy="{y}" r="2.5"/>'
        for y in read_at
    )
    line = f"M {chip_x:.1f} {chip_y:.1f} H {x + 8} Q {x} {chip_y:.1f} {x} {chip_y + 8:.1f}"
    return f'<path class="rail" d="{line} V {read_at[-1]}"/>{dots}'


def _legend(y: float) -> tuple[str, float]:
    x, parts = float(_NAME_X), []
    for kind, label in _LEGEND:
        parts.append(
            f'<rect class="bar {kind}" x="{x:.1f}" y="{y}" width="12" height="12" rx="3"/>'
        )
        parts.append(_text(x + 18, y + 10, label, "soft small"))
        x += 18 + len(label) * 5.9 + 18
    return "".join(parts), y + 12 + _MARGIN


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
