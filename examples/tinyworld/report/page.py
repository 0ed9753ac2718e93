"""Lay out the report as one HTML file that needs nothing but itself."""

import re
from html import escape
from importlib.resources import files

import numpy as np

from .columns import COLUMNS, Column, by_scene, cell, decibel, scene_of, scene_title
from .maps import room_map
from .palette import kind_of, preset_colour
from .pictures import FRAME_MS, films_of, scenes, strip_uri
from .scatter import scatter
from .timeline import timeline

_CARD_FIGURES = ("speedup_vs_off", "psnr_vs_off_db", "psnr_vs_truth_db")
_HEADLINE_PRESET = "all"


def page(result: dict, frames: dict[tuple, np.ndarray], truth: dict[tuple, np.ndarray]) -> str:
    """Return the page; see the package docstring for the input."""
    assets = files(__package__)
    style = (assets / "style.css").read_text(encoding="utf-8")
    script = (assets / "script.js").read_text(encoding="utf-8")
    films = {scene: films_of(scene, frames, truth) for scene in scenes(frames)}
    body = "".join(
        [
            _header(result),
            *(_scene(i, scene, films[scene], result) for i, scene in enumerate(films)),
            _speed_quality(result["rows"]),
            _rows_table(result["rows"]),
            _sites(result["sites"]),
            _how(),
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>lipass demo</title><style>{style}</style></head>"
        f"<body><main>{body}</main><script>{script}</script></body></html>"
    )


def _header(result: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in _headline(result["rows"])
    )
    return (
        '<header><p class="brand">lipass</p><h1>A world model, rolled out live</h1>'
        "<p>The same trained model under the same camera path, compiled with "
        '<code>backend="light_interaction"</code> and one preset after the other. '
        "Play, pause or drag; all pictures, maps and timelines of a scene move together.</p>"
        f'<p class="where">{escape(str(result["device"]))} · {escape(versions)}</p>'
        f'<div class="tiles">{tiles}</div></header>'
    )


def _headline(rows: list[dict]) -> list[tuple[str, str]]:
    """Figures of the preset that does everything, for each regime; means over its scenes."""
    own = [row for row in rows if row["preset"] == _HEADLINE_PRESET]
    tiles = []
    for regime in dict.fromkeys(row["regime"] for row in own):
        here = [row for row in own if row["regime"] == regime]
        if speed := _mean(here, "speedup_vs_off"):
            tiles.append((f"{speed:.1f}x", f"faster than off, {regime}"))
        if distance := _mean(here, "psnr_vs_off_db"):
            tiles.append((decibel(distance, " dB"), f"from the pictures of off, {regime}"))
    dense = {scene_of(row): row for row in rows if row["preset"] == "off"}
    lost = [
        row["psnr_vs_truth_db"] - dense[scene_of(row)]["psnr_vs_truth_db"]
        for row in own
        if row.get("psnr_vs_truth_db") is not None
        and (dense.get(scene_of(row)) or {}).get("psnr_vs_truth_db") is not None
    ]
    if lost:
        tiles.append(
            (
                f"{round(sum(lost) / len(lost), 2) + 0.0:+.2f} dB",
                "against the renderer's truth, vs off",
            )
        )
    counts = [row.get("recompiles_after_warmup") for row in rows]
    recompiles = [count for count in counts if count is not None]
    if recompiles:
        tiles.append((str(sum(recompiles)), "recompiles after warm-up, all presets"))
    return tiles


def _mean(rows: list[dict], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def _scene(position: int, scene: tuple, films: dict[str, np.ndarray], result: dict) -> str:
    rows = {row["preset"]: row for row in result["rows"] if scene_of(row) == scene}
    rollouts = {run["preset"]: run for run in result["rollouts"] if scene_of(run) == scene}
    chunks = [chunk for run in rollouts.values() for chunk in run["chunks"]]
    scale = {
        "context": max((len(chunk["context"]) for chunk in chunks), default=1),
        "seconds": max((chunk.get("seconds") or 0 for chunk in chunks), default=1),
    }
    rooms = result.get("rooms") or {}
    room = rooms.get(str(scene[2])) or result.get("room")
    count = min(len(film) for film in films.values())
    cards = "".join(
        _card(preset, film[:count], rows.get(preset), rollouts.get(preset), room, scale)
        for preset, film in films.items()
    )
    seconds = count * FRAME_MS / 1000
    return (
        f'<details class="scene" {"open" if position == 0 else ""}>'
        f"<summary><h2>{escape(scene_title(scene))}</h2></summary>"
        f'<div class="stage" style="--frames:{count};--seconds:{seconds}s" data-ms="{FRAME_MS}">'
        f'<div class="bar"><button type="button" aria-label="play or pause"></button>'
        f'<input type="range" min="0" max="{count - 1}" value="0" aria-label="frame">'
        f"<output>1 / {count}</output></div>"
        f'<div class="cards">{cards}</div></div></details>'
    )


def _card(
    preset: str,
    film: np.ndarray,
    row: dict | None,
    rollout: dict | None,
    room: dict | None,
    scale: dict[str, float],
) -> str:
    rows, columns = film.shape[1:3]
    parts = [
        f'<article class="card" style="--colour:{preset_colour(preset)}">'
        f"<h3>{escape(preset)}</h3>"
        f'<div class="film" role="img" aria-label="film of {escape(preset)}" '
        f'style="aspect-ratio:{columns}/{rows};background-image:url({strip_uri(film)})"></div>',
        _figures(row) if row else "",
    ]
    if preset == "truth":
        parts.append(_legend())
    if rollout and rollout["chunks"]:
        first_frame = len(rollout["camera"]) - len(film)
        chunk_frames = len(film) // len(rollout["chunks"])
        if room:
            parts.append(room_map(room, rollout, first_frame, chunk_frames))
        parts.append(timeline(rollout, scale, chunk_frames))
        parts.append(_reasons(rollout))
    return "".join([*parts, "</article>"])


def _figures(row: dict) -> str:
    shown = [column for column in COLUMNS if column.key in _CARD_FIGURES]
    return (
        '<dl class="figures">'
        + "".join(
            f"<div><dt>{escape(column.title)}</dt><dd>{cell(column, row)}</dd></div>"
            for column in shown
        )
        + "</dl>"
    )


def _legend() -> str:
    kinds = {
        "sink": "sink: the first frames, always kept",
        "memory": "memory: retrieved because its view overlaps",
        "window": "window: the most recent frames",
        "kept": "kept for another reason",
        "dropped": "dropped",
    }
    lines = "".join(f'<li><i class="{kind}"></i>{text}</li>' for kind, text in kinds.items())
    return (
        f'<ul class="legend">{lines}<li><i class="view"></i>cameras of the current chunk</li></ul>'
        '<p class="hint">Timelines: one column a chunk. Context is stacked by reason; '
        "a hollow step was reused, not computed.</p>"
    )


def _reasons(rollout: dict) -> str:
    """List what each chunk kept and dropped, frames with the same reason on one line.

    The first figure of a reason is each frame's own; the receipt has them all.
    """
    if not any(chunk["reasons"] for chunk in rollout["chunks"]):
        return ""
    parts = ['<details class="why"><summary>kept and dropped</summary>']
    for chunk in rollout["chunks"]:
        kept = set(chunk["context"])
        groups: dict[tuple, list[int]] = {}
        for frame, reason in chunk["reasons"].items():
            alike = re.sub(r"\d+(\.\d+)?", "\u2026", reason, count=1)
            groups.setdefault((int(frame) not in kept, alike), []).append(int(frame))
        overlap = chunk.get("overlap_max")
        seen = "" if overlap is None else f", best overlap {overlap:.2f}"
        parts.append(f"<h4>chunk {chunk['index']}{seen}</h4><ul>")
        for (dropped, reason), numbers in sorted(groups.items()):
            kind = "dropped" if dropped else kind_of(reason)
            parts.append(f'<li><i class="{kind}"></i>{escape(reason)}: {_ranges(numbers)}</li>')
        parts.append("</ul>")
    return "".join([*parts, "</details>"])


def _ranges(numbers: list[int]) -> str:
    """Print 1, 2, 3, 7 as `1-3, 7`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _speed_quality(rows: list[dict]) -> str:
    plots = [
        scatter(rows, "psnr_vs_off_db", "PSNR against off, dB"),
        scatter(rows, "psnr_vs_truth_db", "PSNR against truth, dB"),
    ]
    if not any(plots):
        return ""
    figures = "".join(f"<figure>{plot}</figure>" for plot in plots if plot)
    return (
        "<section><h2>Speed and quality</h2><p>Large dots are means, small ones single scenes. "
        "Presets that equal off to rounding are not in the left plot.</p>"
        f'<div class="plots">{figures}</div></section>'
    )


def _rows_table(rows: list[dict]) -> str:
    head = "".join(f"<th>{escape(column.title)}</th>" for column in COLUMNS)
    body = []
    for scene, group in by_scene(rows).items():
        body.append(
            f'<tr class="group"><th colspan="{len(COLUMNS) + 1}">{escape(scene_title(scene))}'
            "</th></tr>"
        )
        body += [_row(row) for row in group]
    return (
        '<section><h2>All figures</h2><div class="scroll"><table class="rows">'
        f"<thead><tr><th>preset</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        "</div></section>"
    )


def _row(row: dict) -> str:
    cells = "".join(f"<td>{_html_cell(column, row)}</td>" for column in COLUMNS)
    colour = preset_colour(row["preset"])
    return (
        f'<tr class="row"><th style="--colour:{colour}">{escape(row["preset"])}</th>{cells}</tr>'
    )


def _html_cell(column: Column, row: dict) -> str:
    text = cell(column, row)
    return '<span class="none">-</span>' if text == "-" else escape(text)


def _sites(sites: list[dict]) -> str:
    if not sites:
        return ""
    keys = list(dict.fromkeys(key for site in sites for key in site))
    head = "".join(f"<th>{escape(key.replace('_', ' '))}</th>" for key in keys)
    body = "".join(
        f'<tr class="{escape(str(site.get("action", "")))}">'
        + "".join(f"<td>{escape(_plain(site.get(key)))}</td>" for key in keys)
        + "</tr>"
        for site in sites
    )
    rewritten = sum(site.get("action") == "rewritten" for site in sites)
    return (
        f"<section><h2>Attention sites</h2><p>{len(sites)} sites, {rewritten} rewritten, "
        f"{len(sites) - rewritten} kept; every one with its reason.</p>"
        f'<div class="scroll"><table class="sites"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _plain(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)


def _how() -> str:
    return (
        "<footer><p>Speed-up is DiT-core time (prefill and denoising, after warm-up, medians of "
        "interleaved runs) of <code>off</code> over that of the preset; both use the same inner "
        "compiler. PSNR compares frames of the same index, mean squared errors averaged over the "
        "film. Truth is the renderer. Revisits compare a generated frame with what the same "
        "camera saw before.</p></footer>"
    )
