"""Check the noise levels of a denoising loop: numbers that fall, and no timesteps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

_REMEDY = (
    "pass `chunk.steps(scheduler)` if a scheduler takes the steps, or the sigmas with the one at "
    "which the last step ends, usually 0"
)
# The largest sigma that a published model was trained with is 700 (Stable Video Diffusion).
_LOUDEST = 900


def check_levels(given: Any) -> int:
    """Return how many levels there are.

    A tensor on another device than the CPU is judged by its dtype alone: reading it would wait for
    the device.

    Raises:
        TypeError: no levels at all.
        ValueError: levels that are not finite, do not fall, or are timesteps.
    """
    is_array = hasattr(given, "shape") and hasattr(given, "tolist")
    if not is_array and (isinstance(given, str | bytes) or not isinstance(given, Sequence)):
        kind = given.__name__ if isinstance(given, type) else type(given).__name__
        raise TypeError(f"steps must be given sigmas or a scheduler, got {kind}; {_REMEDY}")
    shape = list(given.shape) if is_array else [len(given)]
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(
            f"sigmas must be a list of at least two noise levels, got shape {shape}; "
            "include the last one, usually 0"
        )
    known = _numbers(given)
    for place, level in enumerate(known):
        if level is not None and not math.isfinite(level):
            raise ValueError(
                f"sigmas must be finite, got {level} at place {place}; check the schedule"
            )
    _refuse_timesteps(given, known)
    for place, (level, after) in enumerate(itertools.pairwise(known)):
        if level is None or after is None:
            continue
        if after >= level:
            remedy = (
                "drop one of them" if after == level else
                "turn the list round, or pass 1 - t where t says how clean the latents are"
            )  # fmt: skip
            raise ValueError(
                f"sigmas must fall from step to step, got {level:g} and then {after:g} at place "
                f"{place}; {remedy}"
            )
        if after < 0:
            raise ValueError(
                f"sigmas must be noise levels of 0 or more, got {after:g} at place {place + 1}; "
                "end with 0"
            )
    return int(shape[0])


def _numbers(levels: Any) -> list[float | None]:
    """Return what can be read without waiting for a device; None is what cannot."""
    if isinstance(levels, Tensor):
        if levels.dtype is torch.bool or levels.is_complex():
            raise TypeError(
                f"sigmas must be real numbers, got a tensor of {levels.dtype}; {_REMEDY}"
            )
        if levels.device.type == "meta":
            raise ValueError(f"sigmas must hold values, got a tensor on device meta; {_REMEDY}")
        if levels.device.type != "cpu":
            return [None] * len(levels)
    return [_number(level, place) for place, level in enumerate(_plain(levels))]


def _plain(levels: Any) -> Any:
    return levels.tolist() if hasattr(levels, "tolist") else levels


def _number(level: Any, place: int) -> float | None:
    if isinstance(level, Tensor) and level.numel() and not level.is_complex():
        values = level.flatten().tolist() if level.device.type == "cpu" else []
        return float(values[0]) if len(set(values)) == 1 else None  # a level of each sample
    if isinstance(level, bool) or not isinstance(level, Real):
        raise TypeError(f"sigmas must be numbers, got {level!r:.40} at place {place}; {_REMEDY}")
    return float(level)


def _refuse_timesteps(given: Any, known: list[float | None]) -> None:
    values = [level for level in known if level is not None]
    counted = isinstance(given, Tensor) and not given.is_floating_point()
    if counted and not values:
        raise ValueError(f"sigmas must be noise levels, got a tensor of {given.dtype}; {_REMEDY}")
    top = max(values, default=0.0)
    listed = [] if isinstance(given, Tensor) else _plain(given)
    whole = counted or any(type(level) is int and level > 1 for level in listed)
    all_read = len(values) == len(known)
    if top > 1 and (whole or top > _LOUDEST or (all_read and values[-1] != 0)):
        raise ValueError(
            f"sigmas must be noise levels that end with the last one, got {top:g} .. "
            f"{values[-1]:g}, which look like timesteps; {_REMEDY}"
        )
