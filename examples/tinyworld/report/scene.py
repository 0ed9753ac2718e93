"""Lay out one scene: truth, off and all first and large, then what they read, then the others."""

import itertools
import re
from html import escape

import numpy as np

from .columns import COLUMNS, Column, cell, scene_of, scene_title
from .maps import room_map
from .palette import kind_of, page_colour
from .pictures import FRAME_MS, strip_uri
from .timeline import timeline

LEAD = ("truth", "off", "all")
WHAT = {
    "truth": "what the renderer shows there",
    "off": "plain <code>torch.compile</code>: reads all of the history, computes every step; the "
    "others are compared with it",
    "all": "the same weights and noise; frames, blocks and steps that matter little are left out",
}
_LEAD_FIGURES = {
    "speedup_vs_off": "speed",
    "psnr_vs_truth_db": "dB to truth",
    "psnr_vs_off_db": "dB to off",
}
_KINDS = {
    "sink": "first frames, always kept",
    "memory": "retrieved, as its view overlaps",
    "window": "most recent",
    "kept": "read by a preset that drops none",
    "dropped": "not read",
}


def scene_section(position: int, scene: tuple, films: dict[str, np.ndarray], result: dict) -> str:
    """Return a scene; the first one is open."""
    rows = {row["preset"]: row for row in result["rows"] if scene_of(row) == scene}
    rollouts = {run["preset"]: run for run in result["rollouts"] if scene_of(run) == scene}
    count = min(len(film) for film in films.values())
    drawn = _Drawn(rows, rollouts, _room(result, scene), count)
    lead = [name for name in LEAD if name in films]
    others = [name for name in films if name not in lead]
    others.sort(key=lambda name: name not in rollouts)  # baselines, which read nothing, last
    films = {name: film[:count] for name, film in films.items()}
    seconds = count * FRAME_MS / 1000
    return (
        f'<details class="scene" {"open" if position == 0 else ""}>'
        f"<summary><h2>{escape(scene_title(scene))}</h2></summary>"
        f'<div class="stage" style="--frames:{count};--seconds:{seconds}s" data-ms="{FRAME_MS}">'
        f'<div class="leads">{"".join(drawn.lead(name, films[name]) for name in lead)}</div>'
        '<div class="bar"><button type="button" aria-label="play or pause"></button>'
        f'<input type="range" min="0" max="{count - 1}" value="0" aria-label="frame">'
        f"<output>1 / {count}</output>"
        '<label><input type="checkbox"> at the speed they were made</label></div>'
        f"{drawn.reading(lead)}{_others(drawn, others, films)}</div></details>"
    )


def _room(result: dict, scene: tuple) -> dict | None:
    return (result.get("rooms") or {}).get(str(scene[2])) or result.get("room")


class _Drawn:
    """What the parts of one scene share: rows, rollouts, the room and the scales of bars."""

    def __init__(self, rows: dict, rollouts: dict, room: dict | None, frames: int) -> None:
        self.rows, self.rollouts, self.room, self.frames = rows, rollouts, room, frames
        chunks = [chunk for run in rollouts.values() for chunk in run["chunks"]]
        self.scale = {
            "context": max((len(chunk["context"]) for chunk in chunks), default=1),
            "seconds": max((chunk.get("seconds") or 0 for chunk in chunks), default=1),
        }

    def lead(self, preset: str, film: np.ndarray) -> str:
        """A film of the first row, with its figures."""
        row = self.rows.get(preset)
        figures = ""
        if row and preset != "truth":
            shown = [column for column in COLUMNS if column.key in _LEAD_FIGURES]
            figures = _figures(row, shown, _LEAD_FIGURES)
        return (
            f'<article class="first" style="--colour:{page_colour(preset)}"{self._ends(preset)}>'
            f"<h3>{escape(preset)}</h3>{_film(preset, film)}{figures}"
            f'<p class="what">{WHAT[preset]}</p></article>'
        )

    def reading(self, presets: list[str]) -> str:
        """Map and timeline of those of the first row that were rolled out."""
        drawn = [self._read(name) for name in presets if self._chunks(name)]
        if not drawn:
            return ""
        return (
            f'<section class="read"><h3>What each chunk read</h3>{_legend()}'
            f'<div class="pair">{"".join(drawn)}</div></section>'
        )

    def card(self, preset: str, film: np.ndarray) -> str:
        """All of one of the others."""
        row = self.rows.get(preset)
        figures = _figures(row, [c for c in COLUMNS if c.key in _LEAD_FIGURES]) if row else ""
        read = self._maps(preset) if self._chunks(preset) else ""
        return (
            f'<article class="card" style="--colour:{page_colour(preset)}"{self._ends(preset)}>'
            f"<h3>{escape(preset)}</h3>{_film(preset, film)}{figures}{read}</article>"
        )

    def _chunks(self, preset: str) -> list[dict]:
        return self.rollouts[preset]["chunks"] if preset in self.rollouts else []

    def _ends(self, preset: str) -> str:
        """Say when each chunk was done, in seconds, so that it can be seen as it was made."""
        ends = itertools.accumulate(chunk.get("seconds") or 0 for chunk in self._chunks(preset))
        told = ",".join(f"{end:.3f}" for end in ends)
        return f' data-ends="{told}"' if told else ""

    def _read(self, preset: str) -> str:
        return (
            f'<div class="panel" style="--colour:{page_colour(preset)}"{self._ends(preset)}>'
            f"<h4>{escape(preset)}</h4>{self._maps(preset)}</div>"
        )

    def _maps(self, preset: str) -> str:
        rollout = self.rollouts[preset]
        first_frame = len(rollout["camera"]) - self.frames
        chunk_frames = self.frames // len(rollout["chunks"])
        above = room_map(self.room, rollout, first_frame, chunk_frames) if self.room else ""
        return above + timeline(rollout, self.scale, chunk_frames) + _reasons(rollout)


def _others(drawn: _Drawn, names: list[str], films: dict[str, np.ndarray]) -> str:
    if not names:
        return ""
    cards = "".join(drawn.card(name, films[name]) for name in names)
    return (
        f'<details class="others"><summary>{len(names)} more: {escape(", ".join(names))}</summary>'
        f'<div class="cards">{cards}</div></details>'
    )


def _film(preset: str, film: np.ndarray) -> str:
    rows, columns = film.shape[1:3]
    return (
        f'<div class="film" role="img" aria-label="film of {escape(preset)}" '
        f'style="aspect-ratio:{columns}/{rows};background-image:url({strip_uri(film)})"></div>'
    )


def _figures(row: dict, columns: list[Column], titles: dict[str, str] | None = None) -> str:
    parts = "".join(
        f"<div><dt>{escape((titles or {}).get(column.key, column.title))}</dt>"
        f"<dd>{cell(column, row)}</dd></div>"
        for column in columns
    )
    return f'<dl class="figures">{parts}</dl>'


def _legend() -> str:
    kinds = "".join(
        f'<li><i class="{kind}"></i>{kind}: {text}</li>' for kind, text in _KINDS.items()
    )
    return (
        f'<ul class="legend">{kinds}<li><i class="view"></i>where the chunk looks</li></ul>'
        '<p class="hint">From above; a dot lies where a frame of the history looks. Below, a '
        "column is a chunk: how many frames it read and why, and its steps, hollow where they "
        "were reused.</p>"
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
