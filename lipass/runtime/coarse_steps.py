"""Know which steps of a chunk are on half of the grid, and whether they were taken so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lipass import grow
from lipass.policy.growth import grown, whole
from lipass.policy.steps import StepPlan
from lipass.runtime.agreement import tell
from lipass.runtime.levels import numbers_of
from lipass.runtime.schedule import Schedule
from lipass.switch import is_off

if TYPE_CHECKING:
    from lipass.runtime.chunk import Chunk
    from lipass.runtime.step import Step, StepState

WHY_DENSE = "a step on half of the grid, whose history is on the whole one"


class CoarseSteps:
    """What one chunk takes on half of the grid.

    Attributes:
        taken: indices of the steps that were.
        running: whether the model is being called for one.
    """

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self.taken: set[int] = set()
        self.running = False
        self._of: StepState | None = None
        self._kept: list[Tensor] = []

    def planned(self, plan: StepPlan, schedule: Schedule) -> StepPlan:
        """Complete a plan of steps, once the levels are known; what was recorded stays.

        Raises:
            ValueError: levels that cannot be read, or are not those of flow matching.
        """
        chunk = self._chunk
        options = None if is_off() else chunk.session.config_of(chunk.plan).grow
        if options is None or plan.coarse is not None:
            return plan
        if not options.delta and not options.steps:
            return grown(plan, options, ())
        blend = chunk.plan.steering
        if blend is not None and blend.alpha < 1:
            return whole(plan, "as older history is weighed latent by latent")
        if schedule.why_all is not None:
            return whole(plan, f"as {schedule.why_all}")
        levels = None if schedule.sigmas is None else numbers_of(schedule.sigmas)
        if levels is None:
            what = (
                "a scheduler without sigmas" if schedule.sigmas is None else "sigmas on a device"
            )
            raise ValueError(
                f"steps on half of the grid need noise levels that the host can read, got {what}; "
                "pass a list of numbers, or set 'grow': False"
            )
        return grown(plan, options, levels)

    def velocity(self, step: Step, call: Callable[[Tensor, Any], Tensor], x: Tensor) -> Tensor:
        """Return the velocity of a state in a step on half of the grid.

        A reused step takes what the computed one was given, if that called once: with several
        calls, such as branches of guidance, nobody knows which is which, and the model is asked.

        Raises:
            ValueError: the state is of another grid than that which the plan was made for.
        """
        options, grid = self._chunk.session.config_of(self._chunk.plan).grow, tuple(x.shape[-2:])
        if options is not None and options.grid is not None and options.grid != grid:
            raise ValueError(
                f"grow.grid must be that of the latents, got {options.grid} for latents of "
                f"{grid}; write 'grow.grid': {grid}"
            )
        if not step.reused and self._of is not step.state:
            self._of, self._kept = step.state, []
        answers = step.reused and len(self._kept) == 1

        def asked(small: Tensor, level: Any) -> Tensor:
            if answers:
                self._chunk.hit(step.index)
                return self._kept[0]
            self.running = True
            try:
                found = call(small, level)
            finally:
                self.running = False
            if not step.reused and isinstance(found, Tensor):
                self._kept.append(found.clone())
            return found

        made = grow.velocity(asked, x, step.sigma)
        self.taken.add(step.index)
        return made

    def tell(self) -> None:
        """Tell, once a session, that its loop takes no step on half of the grid."""
        steps, session = self._chunk.plan.steps, self._chunk.session
        asked = session.config_of(self._chunk.plan).grow
        if asked is None or not (asked.delta or asked.steps):
            return
        if self.taken or session.effect.told_whole:
            return
        if steps is not None and steps.coarse is not None:
            if not steps.coarse:
                return
            what = f"{len(steps.coarse)} of {steps.total} steps were planned so, and none was"
        else:
            what = "no loop asked for its steps with their levels"
        session.effect.told_whole = True
        tell(
            f"a loop must ask for steps on half of the grid, got a chunk in which {what}; call "
            "the model by step.velocity(...) in a loop over chunk.steps(sigmas)",
            strict=session.config.strict,
        )
