"""Decide which denoising steps of a chunk are computed on half of the grid.

A step predicts clean latents; on half of the grid those have no high frequencies, so the state
that it leaves has noise there and no signal. That is right to a tolerance as long as the level at
which the step ends is so high that the noise covers them. Power falls with frequency, so the
lowest of them, where the smaller grid ends, decides.

Source: SPEED (arXiv 2605.18736), whose times these are. Differs in: the level of the whole grid is
compared, at the end of a step, and not that of the smaller grid at its beginning; so what is
missing is never more than the tolerance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from lipass.grow_options import GrowOptions
from lipass.policy.steps import StepPlan

_WHOLE = "on the whole grid"


def switch_level(power: float, delta: float) -> float:
    """Return the noise level above which a band of this power holds at most `delta` of signal.

    With `s = ((1 - t) / t) ** 2 * power`, the band's signal to noise, it is the level t at which
    `(1 + power) * s / (1 + s) == delta`; without tolerance it is 1.

    Args:
        power: of the band in clean latents, where noise has 1.
        delta: the tolerance.
    """
    if delta >= 1 + power:
        return 0.0
    return 1 / (1 + math.sqrt(delta / (power * (1 + power - delta))))


def band_power(spectrum: tuple[float, float], shorter: int, ratio: int = 2) -> float:
    """Return the power of the frequencies where a grid ends that is `ratio` times smaller.

    Args:
        spectrum: amplitude and exponent.
        shorter: latents along the shorter side of the whole grid.
        ratio: of the grids.
    """
    amplitude, exponent = spectrum
    return float(amplitude * (shorter / 2 / ratio) ** -exponent)


def grown(plan: StepPlan, options: GrowOptions, levels: Sequence[float]) -> StepPlan:
    """Complete a plan by the steps that are on half of the grid.

    Reused steps follow the one whose output they take, so a step ends where the next one computes.
    The last one that computes is on the whole grid.

    Args:
        plan: which steps compute.
        options: what is asked for.
        levels: `steps + 1` noise levels.

    Raises:
        ValueError: levels that are not those of flow matching.
    """
    if not options.delta and not options.steps:
        return replace(plan, coarse=())
    check_flow(levels)
    switch = None
    if options.delta:
        assert options.spectrum is not None
        assert options.grid is not None
        power = band_power(options.spectrum, min(options.grid))
        switch = switch_level(power, options.delta)
    coarse: list[int] = []
    reasons = list(plan.reasons)
    ends = (*plan.computed[1:], plan.total)
    for index, end in zip(plan.computed, ends, strict=True):
        why = _why_whole(index, end, plan.total, options, levels, switch)
        where = f"{_WHOLE}, {why}" if why else "on half of the grid"
        if not why:
            coarse += range(index, end if plan.form == "lookup" else index + 1)
        for place in range(index, end):
            reasons[place] = f"{reasons[place]}; {where}"
    return replace(plan, coarse=tuple(coarse), reasons=tuple(reasons))


def whole(plan: StepPlan, why: str) -> StepPlan:
    """Complete a plan where no step may be on half of the grid."""
    reasons = tuple(f"{reason}; {_WHOLE}, {why}" for reason in plan.reasons)
    return replace(plan, coarse=(), reasons=reasons)


def check_flow(levels: Sequence[float]) -> None:
    """Refuse levels at which a state is no mixture `(1 - t) * clean + t * noise`.

    Raises:
        ValueError: a level outside of 0..1, or levels that do not fall.
    """
    if other := [level for level in levels if not 0 <= level <= 1]:
        raise ValueError(
            f"steps on half of the grid need levels of flow matching, in 0..1, got {other[0]:g}; "
            "pass sigmas of that form, or set 'grow': False"
        )
    for level, after in itertools.pairwise(levels):
        if after >= level:
            raise ValueError(
                "steps on half of the grid need levels that fall, from noise to clean, got "
                f"{level:g} and then {after:g}; turn them round (`invert_sigmas` of a scheduler), "
                "or set 'grow': False"
            )


def _why_whole(
    index: int,
    end: int,
    total: int,
    options: GrowOptions,
    levels: Sequence[float],
    switch: float | None,
) -> str | None:
    if end == total:
        return "as the last that computes"
    if switch is None:
        return None if index < options.steps else f"behind grow.steps {options.steps}"
    if levels[end] >= switch:
        return None
    return f"it ends at level {levels[end]:.3f} < {switch:.3f}"
