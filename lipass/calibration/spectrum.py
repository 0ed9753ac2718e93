"""Fit the spectrum of the latents that sessions were shown, for the option `grow.spectrum`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lipass.calibration.subject import Run
from lipass.grow import RATIO, fit_spectrum


def spectrum_of(runs: Iterable[Run]) -> dict[str, Any]:
    """Return spectrum and grid as `grow.*` takes them; nothing where no planes were shown.

    Args:
        runs: of the dense model.
    """
    shown = [run.latents for run in runs if run.latents is not None and run.latents.dim() >= 4]
    grids = {tuple(one.shape[-2:]) for one in shown}
    if len(grids) != 1 or min(grid := grids.pop()) < 8 or any(size % RATIO for size in grid):
        return {}
    planes = torch.cat([one.float().reshape(-1, *grid) for one in shown])
    try:
        amplitude, exponent = fit_spectrum(planes)
    except ValueError:  # without power at some frequency
        return {}
    fitted = [float(f"{amplitude:.5g}"), round(exponent, 4)]
    return {"grow.spectrum": fitted, "grow.grid": [*grid]}
