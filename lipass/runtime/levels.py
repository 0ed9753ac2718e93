"""Say whether a call is for the noise level of its step, where levels can be read on the host.

Models are given the level in several forms: the sigma of the loop, the timestep of a scheduler, a
thousand times the sigma, how clean the latents are, a quarter of the logarithm. A call whose level
had such a form in the step that computed, and has another in the step that would reuse it, is no
call of that step but a preview, or a refresh of a cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

# One number a sample, frame or token; more is not read.
_NUMBERS_MAX = 1 << 12
# Levels in bf16 have 8 bits; timesteps may be rounded to integers.
_TOLERANCE = 2**-7


def forms_of(sigma: Any, timestep: Any = None) -> tuple[float | None, ...]:
    """List what a model may be given for the level of one step, None where nobody knows."""
    noise, counted = _number(sigma), _number(timestep)
    if noise is None:
        return (None, None, None, None, None, counted)
    logarithm = math.log(noise) / 4 if noise > 0 else None
    return (noise, 1000 * noise, 1 - noise, 1000 * (1 - noise), logarithm, counted)


def other_level(
    before: Sequence[float | None],
    now: Sequence[float | None],
    levels: Iterator[tuple[str, Any, Any]],
) -> str | None:
    """Name a level that is not that of the step, or return None.

    Args:
        before: `forms_of` the step that computed.
        now: `forms_of` the step of the call.
        levels: name of each level, its value in the call that computed and in this call.
    """
    moved = [(a, b) for a, b in zip(before, now, strict=True) if a is not None and b is not None]
    refuted: list[tuple[str, bool]] = []
    for name, then, level in levels:
        known, given = _numbers(then), _numbers(level)
        if known is None or given is None or len(known) != len(given):
            continue
        # Of a level per frame, those that had the level of the step move with it.
        expected = [
            [b if _is_close(one, a) else one for one in known]
            for a, b in moved
            if any(_is_close(one, a) for one in known)
        ]
        if any(all(map(_is_close, given, one)) for one in expected):
            return None
        if expected:
            refuted.append((name, given == known))
    # Nothing moves with the steps: then what stays, such as frames a second, tells nothing.
    changed = [name for name, same in refuted if not same] or [name for name, _ in refuted]
    return f"its noise level {changed[0]!r} is not that of the step" if changed else None


def _number(given: Any) -> float | None:
    """Return what is one number on the host."""
    numbers = _numbers(given)
    return numbers[0] if numbers and len(set(numbers)) == 1 else None


def _numbers(given: Any) -> list[float] | None:
    """Return the numbers of a level on the host."""
    if isinstance(given, Real):
        return [float(given)]
    if not isinstance(given, Tensor) or given.device.type != "cpu":
        return None
    if not 0 < given.numel() <= _NUMBERS_MAX:
        return None
    return [float(one) for one in given.detach().flatten().tolist()]


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= max(_TOLERANCE * max(abs(a), abs(b)), 1e-6)
