"""Choose for each chunk the point of a frontier that keeps a frame rate, and learn from the time.

What a chunk would take at a point is known before it is made: its plan says how many latents are
read and how many steps compute, the frontier what that took when it was calibrated, and the
chunks before how much slower the machine is now (`lipass.runtime.load`). A point is left at once
where it would be late, and a better one is taken where it would be early enough; after a rise
that did not last the next one is waited for longer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lipass.calibration.device import device_name
from lipass.calibration.frontier import Frontier, undominated
from lipass.config import Config
from lipass.policy.plan import ChunkPlan
from lipass.policy.steps import plan_steps
from lipass.receipt import ChunkRecord, current_report
from lipass.runtime.agreement import tell
from lipass.runtime.load import Load

# A better point has to leave so much of the target free, and is tried so many chunks after a move.
_RISE_AT, _WAIT, _WAIT_MOST = 0.95, 2, 16
# So many chunks in a row that are so late at the fastest point are told.
_LATE_CHUNKS, _LATE = 3, 1.1

PlanAt = Callable[[Config], ChunkPlan]


class Pace:
    """Where one session is on its frontier.

    Args:
        frontier: what there is to choose from.
        configs: options of each of its points, by name.
        target_ms: what a chunk may take; None stays at the fastest point.
        target_db: points that had less are left out; None leaves out none.

    Attributes:
        points: what is chosen from, the best first.
        told_late: whether it was told that the target cannot be kept.
    """

    def __init__(
        self,
        frontier: Frontier,
        configs: Mapping[str, Config],
        target_ms: float | None,
        target_db: float | None,
    ) -> None:
        self.frontier, self.target_ms, self.target_db = frontier, target_ms, target_db
        best = undominated(frontier.points)
        self.points = [p for p in best if target_db is None or p.db >= target_db] or best[:1]
        self._configs = {point.name: configs[point.name] for point in self.points}
        self._places = {point.name: place for place, point in enumerate(self.points)}
        early = (n for n, one in enumerate(self.points) if one.chunk_ms <= (target_ms or 0))
        self._place = next(early, len(self.points) - 1)
        self._load = Load()
        self._since, self._wait, self._late, self._rose = 0, _WAIT, 0, False
        self._total_steps: int | None = None
        self.told_late, self._told_origin = False, False
        self._began: dict[str, Any] = {}
        self._pending: list[tuple[Any, Any, ChunkRecord]] = []

    def config(self, plan: ChunkPlan) -> Config | None:
        """Return the options of the point that a plan was made at; None where it is no point."""
        return self._configs.get(plan.point or "")

    def plan(self, plan_at: PlanAt) -> ChunkPlan:
        """Plan a chunk at the best point that keeps the target.

        Nothing moves before the chunk is finished, so one that was given up is planned anew.
        """
        self._read_events()
        plan = self._plan_at(self._place, plan_at)
        if self.target_ms is None:
            return plan
        if self._takes(plan) <= self.target_ms:
            return self._risen(plan, plan_at) if self._since >= self._wait else plan
        for place in range(self._place + 1, len(self.points)):
            plan = self._plan_at(place, plan_at)
            if self._takes(plan) <= self.target_ms:
                break
        return plan

    def began(self, plan: ChunkPlan) -> None:
        """Note on a GPU when a chunk begins there."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._began[plan.stream] = _recorded()

    def finished(self, record: ChunkRecord) -> None:
        """Learn from a chunk that was made to its end."""
        plan = record.plan
        if plan.point not in self._places:
            return
        self._read_events()  # on ranks that only follow nobody plans
        if plan.steps is not None:
            self._total_steps = plan.steps.total
        self._move(self._places[plan.point])
        began = self._began.pop(plan.stream, None)
        if began is None:
            self._learn(record, record.seconds * 1e3)
        else:  # read in front of a later chunk: waiting would hold up what is launched behind
            self._pending.append((began, _recorded(), record))
        self._tell_origin()

    def forget(self, stream: str) -> None:
        """Forget when a chunk of a stream began, which nobody finishes."""
        self._began.pop(stream, None)

    def state(self) -> dict[str, Any]:
        """Give all as plain data; `restored` takes it back."""
        self._read_events()
        return {
            "frontier": self.frontier.to_dict(),
            "configs": {name: config.to_options() for name, config in self._configs.items()},
            "target_ms": self.target_ms,
            "target_db": self.target_db,
            "load": self._load.state(),
            "place": self._place,
            "waiting": [self._since, self._wait, self._late, self._rose],
            "total_steps": self._total_steps,
            "told": [self.told_late, self._told_origin],
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Pace:
        """Go on where a `state` was given."""
        frontier = Frontier.from_dict(state["frontier"])
        configs = {name: Config.resolve(None, flat) for name, flat in state["configs"].items()}
        pace = cls(frontier, configs, state["target_ms"], state["target_db"])
        pace._load, pace._place = Load(**state["load"]), state["place"]
        pace._since, pace._wait, pace._late, pace._rose = state["waiting"]
        pace._total_steps = state["total_steps"]
        pace.told_late, pace._told_origin = state["told"]
        return pace

    def _plan_at(self, place: int, plan_at: PlanAt) -> ChunkPlan:
        name = self.points[place].name
        return replace(plan_at(self._configs[name]), point=name)

    def _takes(self, plan: ChunkPlan) -> float:
        """Foresee what 19 of 20 chunks like this one take no longer than."""
        assert plan.point is not None
        if self._total_steps is None:
            steps = self.frontier.point(plan.point).steps
        else:
            options, allowed = self._configs[plan.point].steps, plan.revisit.allowed
            planned = plan_steps(self._total_steps, options, allowed=allowed, reason="")
            steps = len(planned.computed)
        return self.frontier.cost.ms(len(plan.context.indices), steps) * self._load.high

    def _risen(self, plan: ChunkPlan, plan_at: PlanAt) -> ChunkPlan:
        """Return the plan at the best point that is early enough, or this one."""
        assert self.target_ms is not None
        for place in reversed(range(self._place)):
            better = self._plan_at(place, plan_at)
            if self._takes(better) > self.target_ms * _RISE_AT:
                break
            plan = better
        return plan

    def _move(self, place: int) -> None:
        """Count since when the session is where it is, and how long a rise is waited for."""
        self._since += 1
        if place == self._place:
            if self._since > 2 * self._wait:
                self._wait, self._rose = _WAIT, False
            return
        if place > self._place and self._rose:
            self._wait = min(2 * self._wait, _WAIT_MOST)
        self._rose = place < self._place
        self._place, self._since = place, 0

    def _learn(self, record: ChunkRecord, took_ms: float) -> None:
        steps = record.plan.steps
        computed = 0 if steps is None else steps.total - record.steps_skipped
        foreseen = self.frontier.cost.ms(len(record.plan.context.indices), computed)
        if record.compiled or foreseen <= 0:
            return
        self._load.add(took_ms / foreseen)
        if self.target_ms is None:
            return
        fastest = self._place == len(self.points) - 1
        self._late = self._late + 1 if fastest and took_ms > self.target_ms * _LATE else 0
        if self._late >= _LATE_CHUNKS and not self.told_late:
            self.told_late = True
            tell(
                f"chunks must keep target_chunk_ms, got {took_ms:.0f} ms for {self.target_ms:g} "
                f"at the fastest point, {self.points[-1].name!r}, in {self._late} chunks running; "
                "raise the target, make room on the device, or, on a CPU that others use, give "
                "torch one thread",
                strict=False,
            )

    def _read_events(self) -> None:
        """Learn from chunks that a GPU has done by now."""
        while self._pending and self._pending[0][1].query():
            began, ended, record = self._pending.pop(0)
            self._learn(record, max(began.elapsed_time(ended), record.seconds * 1e3))

    def _tell_origin(self) -> None:
        """Tell once where the frontier is of another model or device."""
        if self._told_origin:
            return
        self._told_origin = True
        model, sites = self.frontier.model.get("class"), current_report().sites.values()
        names = {one.model.partition("#")[0] for one in sites if one.model}
        if model and names and model.rpartition(".")[2] not in names:
            tell(
                f"a frontier must be of the model that is called, got one of {model} with "
                f"{', '.join(sorted(names))}; calibrate this model, as points of another one say "
                "nothing of it",
                strict=False,
            )
        device, here = self.frontier.environment.get("device"), device_name()
        if self.target_ms is not None and device and device != here:
            tell(
                f"times of a frontier are those of its device, got {device!r} on {here!r}; the "
                "first chunks may be late, then measured times correct it: calibrate here",
                strict=False,
            )


def _recorded() -> Any:
    event: Any = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
