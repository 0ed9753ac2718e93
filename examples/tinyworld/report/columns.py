"""Say once which figures a row has, what they are called and how they are printed."""

import math
from collections.abc import Callable
from typing import NamedTuple

# Exact runs differ from `off` by rounding only; above this the figure is not about pictures.
SAME_DB = 90.0


class Column(NamedTuple):
    """One figure of a row: its key, a head for 80 columns, a full one, and its printed form."""

    key: str
    short: str
    title: str
    text: Callable[[float], str]


def decibel(value: float, unit: str = "") -> str:
    """Print decibels; pictures equal to rounding are `same`."""
    return "same" if value > SAME_DB else f"{value:.1f}{unit}"


def fixed(digits: int, suffix: str = "") -> Callable[[float], str]:
    """Return a printer with `digits` decimals."""
    return lambda value: f"{value:.{digits}f}{suffix}"


def megabytes(value: float) -> str:
    """Print bytes as 10^6 bytes."""
    return f"{value / 1e6:.1f}"


COLUMNS = (
    Column("dit_core_s", "core s", "DiT core, s", fixed(2)),
    Column("speedup_vs_off", "speed", "speed-up", fixed(2, "x")),
    Column("psnr_vs_off_db", "~off", "vs off, dB", decibel),
    Column("psnr_vs_off_affected_db", "~aff", "vs off, affected chunks, dB", decibel),
    Column("psnr_vs_truth_db", "~truth", "vs truth, dB", decibel),
    Column("self_consistency_db", "revis", "revisits, dB", decibel),
    Column("density", "dens", "density", fixed(2)),
    Column("steps_computed", "steps", "steps computed", fixed(0)),
    Column("steps_total", "of", "of steps", fixed(0)),
    Column("context_latents_mean", "ctx", "context, latents", fixed(1)),
    Column("kv_bytes_peak", "KV MB", "KV peak, MB", megabytes),
    Column("recompiles_after_warmup", "rec", "recompiles", fixed(0)),
    Column("compile_s", "compile", "compile, s", fixed(1)),
)


def cell(column: Column, row: dict) -> str:
    """Print one figure of a row; `-` where it was not measured or has no meaning."""
    value = row.get(column.key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return column.text(value)


def by_scene(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Group rows by (trajectory, regime, room), in the order of their first appearance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(scene_of(row), []).append(row)
    return groups


def scene_of(row: dict) -> tuple:
    """Return the scene of a row or rollout: (trajectory, regime, room)."""
    return row["trajectory"], row["regime"], row["room"]


def scene_title(scene: tuple) -> str:
    """Print a scene for people."""
    trajectory, regime, room = scene
    return f"{trajectory}, {regime}, room {room}"
