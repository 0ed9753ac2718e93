"""Read noise levels as a list of sigmas, or as a scheduler that takes the steps itself.

A scheduler (diffusers) counts its own steps and holds its own sigmas: where steps are left out it
ends at another level than the model was asked for, without a word. So with a scheduler every step
is taken, in the lookup form, and the compiled model answers the reused ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lipass.runtime.check_levels import check_levels


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
            ValueError: levels that are none or do not fall, or timesteps in place of sigmas.
        """
        if hasattr(given, "timesteps") and callable(getattr(given, "step", None)):
            return _of_scheduler(given)
        return cls(check_levels(given) - 1, given)

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
