"""Draw the figures for a README or a paper as PNG; the page has its own, live ones."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .columns import SAME_DB
from .palette import preset_colour

_MARKERS = {"explored": "o", "free": "s"}
_CHUNK_PANELS = (
    ("context_latents", "context, latents"),
    ("density", "density"),
    ("steps_computed", "steps computed"),
    ("seconds", "DiT core, s"),
)


def plot_rows(rows: list[dict], path: Path) -> Path:
    """Draw speed against quality: distance from the dense model, and from the renderer's truth."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = (("psnr_vs_off_db", "PSNR vs off, dB"), ("psnr_vs_truth_db", "PSNR vs truth, dB"))
    for axes, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        _plot_quality(axes, [row for row in rows if _is_measured(row, key)], key)
        axes.set(xlabel="speed-up over off", ylabel=label)
        axes.grid(alpha=0.25)
    _legend(figure)
    figure.savefig(path, dpi=144)
    return path


def _is_measured(row: dict, key: str) -> bool:
    value = row.get(key)
    return row.get("speedup_vs_off") is not None and value is not None and value < SAME_DB


def _plot_quality(axes: Axes, rows: list[dict], key: str) -> None:
    for preset in dict.fromkeys(row["preset"] for row in rows):
        colour = preset_colour(preset)
        own = [row for row in rows if row["preset"] == preset]
        for row in own:
            axes.plot(
                row["speedup_vs_off"],
                row[key],
                _MARKERS.get(row["regime"], "^"),
                color=colour,
                alpha=0.45,
                markersize=5,
            )
        x = float(np.mean([row["speedup_vs_off"] for row in own]))
        y = float(np.mean([row[key] for row in own]))
        axes.plot(x, y, "o", color=colour, markersize=9, markeredgecolor="white", label=preset)


def plot_chunks(rollouts: list[dict], path: Path) -> Path:
    """Draw what each preset did chunk by chunk, averaged over the scenes of each regime."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(2, 2, sharex=True).flat, _CHUNK_PANELS, strict=True
    ):
        for preset in dict.fromkeys(rollout["preset"] for rollout in rollouts):
            chunks = [r["chunks"] for r in rollouts if r["preset"] == preset and r["chunks"]]
            length = min(map(len, chunks), default=0)
            if length:
                mean = np.mean([[_value(c, key) for c in line[:length]] for line in chunks], 0)
                axes.plot(mean, ".-", color=preset_colour(preset), label=preset)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("chunk")
    _legend(figure)
    figure.savefig(path, dpi=144)
    return path


def _legend(figure: Figure) -> None:
    """Name every preset once above the panels; a preset may be missing from some of them."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles, loc="outside upper center", ncols=6, frameon=False
        )


def _value(chunk: dict, key: str) -> float:
    value = len(chunk["context"]) if key == "context_latents" else chunk.get(key)
    return float("nan") if value is None else float(value)
