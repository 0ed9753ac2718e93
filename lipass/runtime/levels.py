"""Say whether a call is for the noise level of its step, where levels can be read on the host.

Models are given the level in several forms: the sigma of the loop, the timestep of a scheduler, a
thousand times the sigma, how clean the latents are, a quarter of the logarithm. A call whose level
had such a form in the step that computed, and has another in the step that would reuse it, is no
call of that step but a preview, or a refresh of a cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lipass.runtime.inputs import on_host

# One number a sample, frame or token; more is not read.
_NUMBERS_MAX = 1 << 12
# Levels in bf16 have 8 bits; timesteps may be rounded to integers.
_TOLERANCE = 2**-7


def forms_of(sigma: Any, timestep: Any = None, following: Any = None) -> tuple[float | None, ...]:
    """List what a model may be given for the level of one step, None where nobody knows.

    Args:
        sigma: where the step starts.
        timestep: what a scheduler calls the step.
        following: where it ends; samplers that are compiled with the model are given both.
    """
    start, end = _number(sigma), _number(following)
    size = None if start is None or end is None else end - start
    return (*_forms(start), *_forms(end), size, size and -size, _number(timestep))


def _forms(noise: float | None) -> tuple[float | None, ...]:
    if noise is None:
        return (None,) * 5
    logarithm = math.log(noise) / 4 if noise > 0 else None
    return (noise, 1000 * noise, 1 - noise, 1000 * (1 - noise), logarithm)


def other_level(
    before: Sequence[float | None],
    now: Sequence[float | None],
    levels: Iterable[tuple[str, Any, Any, bool]],
) -> str | None:
    """Say why a call is not for the level of its step, or return None.

    Where a level moves as the steps do, all else that looks like one, such as an action or a
    strength of guidance, conditions the call.

    Args:
        before: `forms_of` the step that computed.
        now: `forms_of` the step of the call.
        levels: of each level its name, its value in the call that computed and in this call, and
            whether that is the same.
    """
    moved = [(a, b) for a, b in zip(before, now, strict=True) if a is not None and b is not None]
    follows = False
    refuted: list[str] = []
    stays: list[str] = []
    unknown: list[str] = []
    for name, then, level, same in levels:
        expected = _expected(moved, then)
        given = _numbers(level)
        if given and any(_are_close(given, one) for one in expected):
            follows = True
        elif expected and given:
            (stays if same else refuted).append(name)
        elif not same:
            unknown.append(name)
    if refuted or (stays and not follows and not unknown):
        return f"its noise level {(refuted or stays)[0]!r} is not that of the step"
    if len(unknown) + follows > 1:
        names = ", ".join(map(repr, unknown))
        return f"its input {names} is another than in the step that computed"
    return None


def _expected(moved: Sequence[tuple[float, float]], then: Any) -> list[list[float]]:
    """List what a level would be now if it had one of the known forms."""
    known = _numbers(then) or []
    # Of a level per frame, those that had the level of the step move with it.
    return [
        [b if _is_close(one, a) else one for one in known]
        for a, b in moved
        if any(_is_close(one, a) for one in known)
    ]


def numbers_of(given: Any) -> list[float] | None:
    """Return a list of levels as numbers, or None where one lies on a device."""
    if hasattr(given, "tolist") and not isinstance(given, Tensor):
        given = given.tolist()
    if isinstance(given, Sequence):
        known = [_number(one) for one in given]
        return None if None in known else [one for one in known if one is not None]
    return _numbers(given)


def _number(given: Any) -> float | None:
    """Return what is one number on the host."""
    numbers = _numbers(given)
    return numbers[0] if numbers and len(set(numbers)) == 1 else None


def _numbers(given: Any) -> list[float] | None:
    """Return the numbers of a level on the host."""
    if isinstance(given, Real):
        return [float(given)]
    if not isinstance(given, Tensor) or not 0 < given.numel() <= _NUMBERS_MAX:
        return None
    values = on_host(given.float() if given.dtype is torch.bfloat16 else given)
    return None if values is None else [float(one) for one in values.ravel()]


def _are_close(mine: list[float], theirs: list[float]) -> bool:
    return len(mine) == len(theirs) and all(map(_is_close, mine, theirs))


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= max(_TOLERANCE * max(abs(a), abs(b)), 1e-6)
