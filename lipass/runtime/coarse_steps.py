"""Know which steps of a chunk are on half of the grid, and whether they were taken so."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lipass import grow
from lipass.policy.growth import check_flow, grown, whole
from lipass.policy.steered_plan import leaves_out
from lipass.policy.steps import StepPlan
from lipass.runtime.agreement import tell
from lipass.runtime.levels import numbers_of
from lipass.runtime.schedule import Schedule
from lipass.runtime.scope import branch_name
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
        by_pipeline: whether a pipeline calls the model by itself, and no step so.
    """

    def __init__(self, chunk: Chunk) -> None:
        self._chunk: Chunk = weakref.proxy(chunk)
        self.taken: set[int] = set()
        self.running = self.by_pipeline = False
        self._bare: StepPlan | None = None
        self._of: StepState | None = None
        self._now: StepState | None = None
        self._kept: dict[str, list[Tensor]] = defaultdict(list)
        self._asked: Counter[str] = Counter()

    def bare(self, plan: StepPlan) -> StepPlan:
        """Return the chunk's plan of steps as it is without levels: each loop has its own."""
        if plan.coarse is None:
            self._bare = plan
        return self._bare or plan

    def planned(self, plan: StepPlan, schedule: Schedule) -> StepPlan:
        """Complete a plan of steps, once the levels are known; what was recorded stays.

        Levels on a device are read, once a loop and in front of its first call.

        Raises:
            ValueError: levels that are not one number a step, or are not those of flow matching.
        """
        chunk = self._chunk
        options = None if is_off() else chunk.session.config_of(chunk.plan).grow
        if plan.coarse:  # as recorded
            check_flow(_numbers(schedule) or ())
        if options is None or plan.coarse is not None:
            return plan
        if not options.delta and not options.steps:
            return grown(plan, options, ())
        blend = chunk.plan.steering
        if blend is not None and blend.alpha < 1:
            return whole(plan, "as older history is weighed latent by latent")
        if leaves_out(chunk.plan.context):
            return whole(plan, "as there all latents are read, those too that steering left out")
        if self.by_pipeline:
            return whole(plan, "as a pipeline calls the model itself")
        if schedule.why_all is not None:
            return whole(plan, f"as {schedule.why_all}")
        levels = _numbers(schedule)
        if levels is None:
            what = (
                "a scheduler without sigmas"
                if schedule.sigmas is None
                else "levels that differ between samples or frames"
            )
            raise ValueError(
                f"steps on half of the grid need one noise level a step, got {what}; "
                "pass a list of numbers, or set 'grow': False"
            )
        return grown(plan, options, levels)

    def velocity(self, step: Step, call: Callable[[Tensor, Any], Tensor], x: Tensor) -> Tensor:
        """Return the velocity of a state in a step on half of the grid.

        A reused step takes what the computed one was given, where each called once in a branch
        (`session.stream`): of several calls nobody knows which is which, and the model is asked.

        Raises:
            ValueError: the state is of another grid than that which the plan was made for.
        """
        options, grid = self._chunk.session.config_of(self._chunk.plan).grow, tuple(x.shape[-2:])
        if options is not None and options.grid is not None and options.grid != grid:
            raise ValueError(
                f"grow.grid must be that of the latents, got {options.grid} for latents of "
                f"{grid}; write 'grow.grid': {grid}"
            )
        if self._now is not step.state:
            self._now = step.state
            self._asked.clear()
        if not step.reused and self._of is not step.state:
            self._of = step.state
            self._kept.clear()
        branch = branch_name(self._chunk.session)
        self._asked[branch] += 1
        kept = self._kept[branch]
        answers = step.reused and len(kept) == self._asked[branch] == 1
        steps = self._chunk.plan.steps
        keeps = steps is not None and steps.form == "lookup" and bool(steps.reused)

        def asked(small: Tensor, level: Any) -> Tensor:
            if answers:
                self._chunk.hit(step.index)
                return kept[0]
            self.running = True
            try:
                found = call(small, level)
            finally:
                self.running = False
            if keeps and not step.reused and isinstance(found, Tensor):
                kept.append(found.detach().clone())
            return found

        made = grow.velocity(asked, x, step.sigma)
        self.taken.add(step.index)
        return made

    def forget(self) -> None:
        """Drop what is kept for reused steps, whose loop is over."""
        self._of = self._now = None
        self._kept.clear()

    def tell(self) -> None:
        """Tell, once a session, that its loop takes no step on half of the grid."""
        steps, session = self._chunk.plan.steps, self._chunk.session
        asked = session.config_of(self._chunk.plan).grow
        if asked is None or not (asked.delta or asked.steps):
            return
        if self.taken or session.effect.told_whole:
            return
        if self.by_pipeline:
            what = "a pipeline calls the model itself"
        elif steps is not None and steps.coarse is not None:
            if not steps.coarse:
                return
            what = f"{len(steps.coarse)} of {steps.total} steps were planned so, and none was"
        else:
            what = "no loop asked for its steps with their levels"
        tell(
            f"a loop must ask for steps on half of the grid, got a chunk in which {what}; call "
            "the model by step.velocity(...) in a loop over chunk.steps(sigmas)",
            strict=session.config.strict,
        )
        session.effect.told_whole = True


def _numbers(schedule: Schedule) -> list[float] | None:
    """Return the levels of a loop as numbers, or None where it has none."""
    sigmas = schedule.sigmas
    if isinstance(sigmas, Tensor):
        sigmas = sigmas.detach().cpu()
    elif isinstance(sigmas, list | tuple):
        sigmas = [one.detach().cpu() if isinstance(one, Tensor) else one for one in sigmas]
    return None if sigmas is None else numbers_of(sigmas)
