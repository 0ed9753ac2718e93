"""Read noise levels as a list of sigmas, or as a scheduler that takes the steps itself.

A scheduler (diffusers) counts its own steps and holds its own sigmas: where steps are left out it
ends at another level than the model was asked for, without a word. So with a scheduler every step
is taken, in the lookup form, and the compiled model answers the reused ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_REMEDY = (
    "pass `chunk.steps(scheduler)` if a scheduler takes the steps, or the sigmas with the one at "
    "which the last step ends, usually 0"
)


# The largest sigma that a published model was trained with is 700 (Stable Video Diffusion).
_LOUDEST = 900


@dataclass(frozen=True)
class Schedule:
    """The levels of one denoising loop.

    Attributes:
        steps: how many steps it takes.
        sigmas: `steps + 1` levels; None where the scheduler has none (DDIM, LCM).
        timesteps: one a step, what the model and the scheduler are called with; or None.
        form: the form that the loop needs; None leaves it to the options.
        why_all: why no step may be reused, or None.
    """

    steps: int
    sigmas: Sequence[Any] | Tensor | None
    timesteps: Sequence[Any] | Tensor | None = None
    form: str | None = None
    why_all: str | None = None

    @classmethod
    def of(cls, given: Any) -> Schedule:
        """Read what a loop is given.

        A tensor on another device than the CPU is judged by its dtype alone: reading it would
        wait for the device.

        Raises:
            TypeError: neither levels nor a scheduler.
            ValueError: levels that are none, or timesteps in place of sigmas.
        """
        if hasattr(given, "timesteps") and callable(getattr(given, "step", None)):
            return _of_scheduler(given)
        if not isinstance(given, Tensor) and not hasattr(given, "__len__"):
            raise TypeError(
                f"steps must be given sigmas or a scheduler, got {type(given).__name__}; {_REMEDY}"
            )
        shape = list(given.shape) if hasattr(given, "shape") else [len(given)]
        if len(shape) != 1 or shape[0] < 2:
            raise ValueError(
                f"sigmas must be a list of at least two noise levels, got shape {shape}; "
                "include the last one, usually 0"
            )
        _check_levels(given)
        return cls(shape[0] - 1, given)

    def level(self, index: int) -> Any:
        """Return the sigma of a step, of `steps` the one it ends at; None where there is none."""
        return None if self.sigmas is None else self.sigmas[index]

    def timestep(self, index: int) -> Any:
        """Return the timestep of a step, or None where no scheduler takes the steps."""
        return None if self.timesteps is None else self.timesteps[index]


def _of_scheduler(scheduler: Any) -> Schedule:
    timesteps = scheduler.timesteps
    if timesteps is None or getattr(scheduler, "num_inference_steps", 1) is None:
        raise ValueError(
            f"a scheduler must know its steps, got {type(scheduler).__name__} without any; call "
            "its set_timesteps first, for each chunk"
        )
    if getattr(scheduler, "step_index", None):
        raise ValueError(
            f"a scheduler must stand at its first step, got {type(scheduler).__name__} at step "
            f"{scheduler.step_index}; call its set_timesteps for each chunk"
        )
    steps = len(timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) != steps + 1:
        sigmas = None
    # Heun's second slope is no step of its own.
    order = getattr(scheduler, "order", 1)
    why = None if order == 1 else f"the scheduler calls the model {order} times a step"
    return Schedule(steps, sigmas, timesteps, "lookup", why)


def _check_levels(levels: Any) -> None:
    values: list[Any] = []
    if not isinstance(levels, Tensor):
        plain = levels.tolist() if hasattr(levels, "tolist") else levels  # numpy
        values = [level for level in plain if isinstance(level, int | float)]
    elif levels.device.type == "cpu":
        values = levels.tolist()
    for level in values:
        if not math.isfinite(level):
            raise ValueError(f"sigmas must be finite, got {level}; check the schedule")
    counted = isinstance(levels, Tensor) and not levels.is_floating_point()
    top = max(values, default=0.0)
    if counted and not values:
        raise ValueError(f"sigmas must be noise levels, got a tensor of {levels.dtype}; {_REMEDY}")
    whole = counted or any(type(level) is int and level > 1 for level in values)
    all_read = len(values) == len(levels)
    if top > 1 and (whole or top > _LOUDEST or (all_read and values[-1] != 0)):
        raise ValueError(
            f"sigmas must be noise levels that end with the last one, got {top:g} .. "
            f"{values[-1]:g}, which look like timesteps; {_REMEDY}"
        )
