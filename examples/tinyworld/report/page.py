"""Lay out the report as one HTML file that needs nothing but itself."""

from importlib.resources import files

import numpy as np

from .headline import header
from .pictures import films_of, scenes
from .scatter import scatter
from .scene import scene_section
from .tables import rows_table, sites_table


def page(result: dict, frames: dict[tuple, np.ndarray], truth: dict[tuple, np.ndarray]) -> str:
    """Return the page; see the package docstring for the input."""
    assets = files(__package__)
    style = (assets / "style.css").read_text(encoding="utf-8")
    script = (assets / "script.js").read_text(encoding="utf-8")
    films = {scene: films_of(scene, frames, truth) for scene in scenes(frames)}
    body = "".join(
        [
            header(result),
            *(scene_section(i, scene, films[scene], result) for i, scene in enumerate(films)),
            _speed_quality(result["rows"]),
            rows_table(result["rows"]),
            sites_table(result["sites"]),
            _how(),
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>lipass demo</title><style>{style}</style></head>"
        f"<body><main>{body}</main><script>{script}</script></body></html>"
    )


def _speed_quality(rows: list[dict]) -> str:
    if len({row["preset"] for row in rows if row.get("speedup_vs_off") is not None}) < 3:
        return ""  # two dots say less than the sentence at the top
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


def _how() -> str:
    return (
        "<footer><p>Speed-up is DiT-core time (prefill and denoising, after warm-up, medians of "
        "interleaved runs) of <code>off</code> over that of the preset; both use the same inner "
        "compiler. PSNR compares frames of the same index, mean squared errors averaged over the "
        "film. Truth is the renderer. Revisits compare a generated frame with what the same "
        "camera saw before.</p></footer>"
    )
