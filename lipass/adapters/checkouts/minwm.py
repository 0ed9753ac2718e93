"""Build a small minWM from a checkout: Self-Forcing with cameras, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

from lipass.adapters.checkouts import self_forcing
from lipass.adapters.checkouts.subject import Subject


def build(checkout: Path, layers: int = 2) -> Subject:
    """Import a checkout and make a few layers of its transformer with random weights."""
    root = checkout / "Wan21"
    return self_forcing.build(
        root if root.is_dir() else checkout,
        layers,
        "minwm",
        helpers="wan_utils",
        has_cameras=True,
    )
