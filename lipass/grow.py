"""Compute a denoising step on half of the grid, and answer with the velocity of the whole one.

A state of flow matching is `(1 - t) * clean + t * noise`, on planes `[.., Y, X]` of latents. Its
low frequencies, scaled, are a state on the smaller grid at a lower level, since a mean of noise is
quieter (`retimed`). What the model predicts there is made larger with no high frequencies, and the
velocity that leads to it is that of the whole grid::

    small = gain * smaller(x)                    level: lower than t
    clean = larger(small - level * model(small, level))
    v = (x - clean) / t

So the sampler and the noise that it has drawn stay as they are: Euler's next state has the low
frequencies that the model predicts, and in the high ones the noise that it had, at the new level.
It is the state that SPEED (arXiv 2605.18736) makes where it grows the grid.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipass.kernels.autocast import in_given_dtypes

RATIO = 2


def smaller(planes: Tensor) -> Tensor:
    """Put planes `[.., Y, X]` on half of the grid by their low frequencies; a constant stays.

    For what conditions a step on half of the grid and lies on the grid itself.

    Raises:
        ValueError: an odd grid.
    """
    for name, size in zip("YX", planes.shape[-2:], strict=True):
        if size % RATIO:
            raise ValueError(
                f"a grid must be even to be halved, got {size} latents along {name}; pad it, or "
                "set 'grow': False"
            )
    rows, columns = (_halving(size, planes.device) for size in planes.shape[-2:])
    return _product(rows, planes, columns.mT).to(planes.dtype)


def larger(planes: Tensor) -> Tensor:
    """Put planes `[.., Y, X]` on a grid twice as large, with no high frequencies."""
    rows, columns = (_halving(RATIO * size, planes.device) for size in planes.shape[-2:])
    # The halving of amplitudes along both axes is undone.
    return (RATIO**2 * _product(rows.mT, planes, columns)).to(planes.dtype)


@in_given_dtypes
def _product(rows: Tensor, planes: Tensor, columns: Tensor) -> Tensor:
    """Multiply planes from both sides in float32, whatever autocast the loop is in."""
    return rows @ planes.float() @ columns


def retimed(level: Any) -> tuple[Any, Any]:
    """Return gain and level of the low frequencies of a state, as a state of half of the grid.

    `gain * (1 - t) == 1 - level` for the signal, and `gain * t / 2 == level` for the noise.

    Args:
        level: t of the whole grid, a number or a tensor.
    """
    gain = RATIO / (RATIO - (RATIO - 1) * level)
    return gain, gain * level / RATIO


def velocity(call: Callable[[Tensor, Any], Tensor], x: Tensor, level: Any) -> Tensor:
    """Return the velocity of a state, computed on half of its grid.

    Args:
        call: returns the velocity of a state at a level, on whichever grid.
        x: the state `[B, .., Y, X]`.
        level: its noise level, above 0; a number, or a tensor of one a sample.

    Raises:
        TypeError: a call that returns no tensor.
        ValueError: a state without planes, an odd grid, or a velocity of another shape.
    """
    if x.dim() < 4:
        raise ValueError(
            f"a step on half of the grid needs latents [B, .., Y, X], got shape {list(x.shape)}; "
            "pack them inside of the call, or set 'grow': False"
        )
    coarse, here = retimed(level)[1], _beside(level, x)
    gain, below = retimed(here)
    small = gain * smaller(x.float())
    given = small.to(x.dtype)
    _keep_static(given)
    found = call(given, coarse)
    if not isinstance(found, Tensor):
        raise TypeError(
            "a call must return the velocity, got "
            f"{type(found).__name__}; take it out of what the model returns"
        )
    if found.shape != given.shape:
        raise ValueError(
            "a call must return a velocity of the shape of its latents, got "
            f"{list(found.shape)} for {list(given.shape)}; make positions and patches of the grid "
            "that it is given, or set 'grow': False"
        )
    clean = larger(small - below * found.float())
    return ((x.float() - clean) / here).to(x.dtype)


def _beside(level: Any, x: Tensor) -> Any:
    """Shape a level so that it multiplies a state `[B, ..]`."""
    if not isinstance(level, Tensor):
        return level
    if level.numel() == 1:
        return level.reshape(()).to(x.device)
    if level.shape != x.shape[:1]:
        raise ValueError(
            "a step on half of the grid needs one noise level, or one a sample, got levels of "
            f"shape {list(level.shape)} for latents of {list(x.shape)}; set 'grow': False"
        )
    return level.to(x.device).reshape(-1, *[1] * (x.dim() - 1))


def _keep_static(planes: Tensor) -> None:
    """Have Dynamo make a graph for each of two grids, and none for all grids."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:  # something was compiled
        for axis in (planes.dim() - 2, planes.dim() - 1):
            dynamo.mark_static(planes, axis)


def fit_spectrum(latents: Tensor) -> tuple[float, float]:
    """Return amplitude and exponent (A, beta) of the power of clean latents, `A * w ** -beta`.

    Powers of the cosine transform are averaged over rings of one cycle along the shorter side, of
    all latents and channels, and a line is fitted to their logarithms; the mean of a plane is left
    out.

    Args:
        latents: `[.., Y, X]`, of as many scenes as there are; normalised as the model has them.

    Raises:
        ValueError: fewer than three rings, or latents without any power in one of them.
    """
    rows, columns = latents.shape[-2:] if latents.dim() > 1 else (1, latents.numel())
    shorter = min(rows, columns)
    if shorter < 8:
        raise ValueError(
            "a spectrum needs latents [.., Y, X] of at least 8 rows and columns, got shape "
            f"{list(latents.shape)}; give grow.steps in place of grow.delta"
        )
    flat = latents.detach().double().cpu().reshape(-1, rows, columns)
    found = cosines(rows) @ flat @ cosines(columns).mT
    # The k-th cosine has k / 2 cycles along its axis.
    down, across = (
        torch.arange(size, dtype=torch.float64) / 2 * shorter / size for size in (rows, columns)
    )
    cycles = torch.hypot(down[:, None], across).round().long()
    powers = [found[:, cycles == ring].square().mean() for ring in range(1, shorter // 2 + 1)]
    if not all(power > 0 for power in powers):
        raise ValueError(
            "a spectrum needs power at all frequencies, got none in a ring; give latents of "
            "real scenes"
        )
    x = torch.arange(1, shorter // 2 + 1, dtype=torch.float64).log()
    y = torch.stack(powers).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    slope = min(slope, 0.0)
    return math.exp(float(y.mean()) - slope * float(x.mean())), -slope


def cosines(size: int) -> Tensor:
    """Orthonormal cosine transform `[n, n]` in float64, frequencies down."""
    k, x = torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64)
    table = torch.cos(math.pi * (x + 0.5) * k[:, None] / size) * math.sqrt(2 / size)
    table[0] /= math.sqrt(2)
    return table


@functools.lru_cache(64)
def _halving(size: int, device: torch.device) -> Tensor:
    """Rows `[n/2, n]` that keep the lower half of the frequencies along one axis."""
    half = size // RATIO
    with torch.inference_mode(False):  # it is kept, and others may record gradients
        found = cosines(half).mT @ cosines(size)[:half] / math.sqrt(RATIO)
        return found.float().to(device)
