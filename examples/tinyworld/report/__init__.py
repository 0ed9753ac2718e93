"""Turn the measurements of a demo into files a person can look at.

The input is plain data, so that the report needs neither the model nor the session:

`result`
    A JSON-able dict with `schema_version`, `device`, `versions`, `rows` (one per preset,
    trajectory, regime and room), `rollouts` (the same keys; `chunks`, and `camera`
    `[[x_m, z_m, yaw_deg], ...]` of history and generated frames), `sites`, and `rooms`
    (`{str(room): {"size": [w, d], "boxes": [[x0, z0, x1, z1], ...]}}`; plain `room` if all
    scenes share one).
`frames`
    `{(preset, trajectory, regime, room): uint8 [F, H, W, 3]}`, the generated frames.
`truth`
    `{(trajectory, regime, room): uint8 [F, H, W, 3]}` from the renderer, same frames.
"""

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np

from .columns import scene_of
from .page import page
from .pictures import contact_sheet, films_of, mp4, scenes, side_by_side
from .plots import plot_chunks, plot_rows
from .race import RACERS, race
from .table import table

__all__ = ["mp4_left_out", "races", "table", "write_report"]


def write_report(
    result: dict,
    frames: dict[tuple, np.ndarray],
    truth: dict[tuple, np.ndarray],
    out: Path,
) -> list[Path]:
    """Write page, receipt, PNGs, a film a scene and a GIF of a race; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "report.html", out / "receipt.json"]
    written[0].write_text(page(result, frames, truth), encoding="utf-8")
    written[1].write_text(json.dumps(_without_nan(result), indent=1), encoding="utf-8")
    for scene in scenes(frames):
        films = films_of(scene, frames, truth)
        stem = re.sub(r"[^\w-]+", "-", "-".join(map(str, scene)))
        written.append(contact_sheet(films, out / f"frames-{stem}.png"))
        written.append(side_by_side(films, out / f"film-{stem}.gif"))
        if mp4_left_out() is None:
            written.append(mp4(films, out / f"film-{stem}.mp4"))
    written += races(result, frames, out)
    written.append(plot_rows(result["rows"], out / "speed-quality.png"))
    written.append(plot_chunks(result["rollouts"], out / "chunks.png"))
    return written


def mp4_left_out() -> str | None:
    """Say why films are written as GIF alone; None where they are written as mp4 too."""
    if importlib.util.find_spec("av"):
        return None
    return "no mp4 beside the GIFs: PyAV is not installed; pip install 'lipass[video]'"


def races(result: dict, frames: dict[tuple, np.ndarray], out: Path) -> list[Path]:
    """Write the race of the first scene, where both racers were timed."""
    for scene in scenes(frames)[:1]:
        runs = {run["preset"]: run for run in result["rollouts"] if scene_of(run) == scene}
        seconds = {
            name: [chunk.get("seconds") or 0.0 for chunk in runs[name]["chunks"]]
            for name in RACERS
            if name in runs and (name, *scene) in frames
        }
        if len(seconds) == len(RACERS) and all(sum(times) for times in seconds.values()):
            films = {name: frames[name, *scene] for name in RACERS}
            return [race(films, seconds, out / "race.gif")]
    return []


def _without_nan(value: object) -> object:
    """Replace NaN and infinities by None, which JSON has a word for."""
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
