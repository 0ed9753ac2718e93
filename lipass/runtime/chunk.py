"""Carry the decisions of one chunk from the user's loop to the compiled model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lipass.errors import LipassError
from lipass.policy.plan import ChunkPlan, with_steps
from lipass.policy.steps import StepPlan, all_taken, plan_steps
from lipass.receipt import current_report
from lipass.runtime.chunk_record import record_of
from lipass.runtime.coarse_steps import CoarseSteps
from lipass.runtime.events import Compiled
from lipass.runtime.follow import Follow
from lipass.runtime.schedule import Schedule
from lipass.runtime.scope import Block, enter, leave
from lipass.runtime.step import StepState
from lipass.runtime.steps import StepLoop, StepSequence
from lipass.switch import is_off

if TYPE_CHECKING:
    from lipass.session import Session


class Chunk:
    """One chunk of a stream; made by `Session.chunk`, used in a `with` block.

    Attributes:
        session: the session it belongs to.
        plan: its decisions.
        held: history latents that the loop holds, in the order in which it does.
        says_held: whether the loop has said so; all of them in the order of time if not.
        chooses: whether its plan says what is read, and not the loop or a graph.
        active: the step that model calls belong to; None outside of steps.
        loop: the loop of steps that is running; None outside of one.
        lookups: calls answered from kept outputs.
        misses: calls of reused steps that computed; `why_missed` counts the reasons.
        latents_read: most history latents that a compiled call read; None where none was called,
            or it chose by itself.
        coarse: what it takes on half of the grid.
    """

    def __init__(
        self, session: Session, plan: ChunkPlan, held: Sequence[int] | None = None
    ) -> None:
        self.session = session
        self.plan = plan
        self.held = tuple(range(plan.history_latents) if held is None else held)
        self.says_held = held is not None
        self.chooses = session.config.context is not None or plan.context.chosen
        self.active: StepState | None = None
        self.loop: StepLoop | None = None
        self.latents_read: int | None = None
        self.lookups, self.misses, self.why_missed = 0, 0, Counter[str]()
        self._answered, self._missed = set[int](), set[int]()
        self.coarse = CoarseSteps(self)
        self._listed = self._finished = False
        self._began, self._began_ns, self._graphs = 0.0, 0, 0
        self._compiled = Compiled.now()
        self._block: Block | None = None

    @property
    def index(self) -> int:
        """Chunks of the stream before this one."""
        return self.plan.index

    @property
    def context(self) -> list[int]:
        """History latents that the model reads, ascending."""
        return self.plan.context.indices

    @property
    def text(self) -> Any:
        """What to pass as the prompt, from what `Session.steer` was told; an object a blend.

        Raises:
            LipassError: nothing was said.
        """
        return self.session.prompts.text(self.plan)

    @property
    def memory(self) -> list[tuple[Any, list[int]]]:
        """`context` in runs, in order, each with the text under which its latents were made.

        A loop that encodes its context anew for each chunk encodes each run with its own text:
        what was made under one prompt and is encoded with another tells the model to stay.
        """
        return self.session.prompts.memory(self.plan)

    @property
    def recache(self) -> tuple[int, ...]:
        """History latents that a loop with a cache encodes anew, with `text`, before the steps."""
        return self.plan.steering.recache if self.plan.steering is not None else ()

    @property
    def given_up(self) -> list[int]:
        """Latents that no chunk reads from here on, though the loop holds them."""
        blend = self.plan.steering
        flush = None if blend is None else blend.flush
        return [] if flush is None else [i for i in self.held if flush[0] <= i < flush[1]]

    def steps(self, sigmas: Sequence[float] | Tensor | Any) -> StepSequence:
        """Iterate over the denoising steps that the sampler takes.

        In the "merge" form only computed steps come, each reaching over the reused ones behind it;
        in the "lookup" form all come, and the compiled model answers the reused ones itself.

        Args:
            sigmas: `steps + 1` noise levels, the last one included; a tensor is read on the CPU
                only. Or a scheduler of diffusers after `set_timesteps`, which takes all steps
                itself, `x = scheduler.step(v, step.timestep, x).prev_sample`: form "lookup".

        Raises:
            ValueError: fewer than two levels, one that is not finite, timesteps in place of
                sigmas, a scheduler that has no timesteps yet, or levels that `grow` cannot read.
        """
        schedule = Schedule.of(sigmas)
        plan = self.coarse.bare(self.step_plan(schedule.steps))
        if schedule.form is not None:
            plan = all_taken(plan, schedule.why_all)
        plan = self.coarse.planned(plan, schedule)
        self.plan = with_steps(self.plan, plan)
        return StepSequence(self, plan.sequence(), schedule)

    def follow(self, scheduler: Any) -> Follow:
        """Let a pipeline's own loop be that of this chunk, for which its scheduler is the clock.

        ::

            with session.chunk(poses=..., query=...) as chunk, chunk.follow(pipe.scheduler):
                clip = pipe(prompt, ...).frames

        The scheduler takes all steps, as with `steps(scheduler)`; the compiled model answers those
        that are reused. When the block is left, the scheduler is as it was.

        Raises:
            TypeError: no scheduler of diffusers.
        """
        return Follow(self, scheduler)

    def step_plan(self, total: int) -> StepPlan:
        """Decide which of `total` steps compute, for a loop that is inside the compiled graph.

        Raises:
            ValueError: another number than the chunk was asked for before.
        """
        if self.plan.steps is None:
            options = None if is_off() else self.session.config_of(self.plan).steps
            revisit = self.plan.revisit
            steps = plan_steps(total, options, allowed=revisit.allowed, reason=revisit.reason)
            self.plan = with_steps(self.plan, steps)
        assert self.plan.steps is not None
        if self.plan.steps.total != total:
            raise ValueError(
                f"a chunk has one number of steps, got {total} after {self.plan.steps.total}; "
                "pass sigmas of the same length, or open another loop, such as a refiner's, in a "
                "chunk of a stream of its own"
            )
        return self.plan.steps

    def hit(self, step: int) -> None:
        """Count a call that was answered in a reused step."""
        self.lookups += 1
        self._answered.add(step)

    def miss(self, step: int, reason: str) -> None:
        """Count a call that computed though its step is reused."""
        self.misses += 1
        self.why_missed[reason] += 1
        self._missed.add(step)

    def steps_skipped(self) -> int:
        """Count the steps that were not computed, whatever was planned.

        A merged step never comes; a looked-up one is skipped where all that was asked for in it
        was answered.
        """
        steps = self.plan.steps
        if steps is None or steps.form == "merge":
            return 0 if steps is None else len(steps.reused)
        return len(self._answered - self._missed)

    def begin(self, loop: StepLoop) -> None:
        """Start a loop of steps; it replaces the one before.

        Raises:
            LipassError: the chunk is not open, so no call of the loop could belong to it.
        """
        if self._block is None:
            raise LipassError(
                f"steps are taken inside of their chunk's block, got chunk {self.index} of "
                f"{self.plan.stream!r}, which is not open; write "
                "`with session.chunk(...) as chunk:` around the loop, and close the session later"
            )
        self.loop = loop
        self.active = None
        self._listed = False

    def end(self, loop: StepLoop) -> None:
        """Close a loop of steps, if it is the one that runs."""
        if self.loop is not loop:
            return
        steps = self.plan.steps
        waits = steps is not None and steps.form == "lookup" and bool(steps.reused)
        self._listed = waits and not loop.calls
        self.loop = self.active = None

    def refuse_listed_steps(self) -> None:
        """Refuse a model call behind a loop of steps that was over before the model was called.

        Raises:
            LipassError: the steps were taken as a list, and some of them are reused.
        """
        if self._listed:
            raise LipassError(
                "a model call must belong to a step, got one after all steps of the chunk were "
                "taken, as list(chunk.steps(...)) takes them; iterate over chunk.steps(...) "
                "itself (tqdm may wrap it), or call the model inside `with step:`"
            )

    def forget(self) -> None:
        """Drop what the chunk holds for later calls."""
        if self.loop is not None:
            self.loop.close()
        if self._block is not None:
            leave(self._block)
            self._block = None

    def close(self) -> None:
        """Give the chunk up, as an exception in its block does; it may be tried again.

        For a chunk that was entered without `with`, and interrupted.
        """
        self.forget()
        self.session.turns.leave(self)

    def __enter__(self) -> Chunk:
        if self._finished:
            raise LipassError(
                f"a chunk is generated once, got chunk {self.index} of stream "
                f"{self.plan.stream!r} again; make the next with session.chunk(...)"
            )
        self.session.turns.begin(self)
        self._count_from_nothing()
        if self.session.measured is not None:
            self.session.measured.wait()
        self._began = time.perf_counter()
        self._graphs = current_report().graphs
        self._began_ns = time.time_ns()
        self._compiled = Compiled.now()
        if self.session.pace is not None:
            self.session.pace.began(self.plan)
        self._block = Block(self.session, self)
        enter(self._block)
        return self

    def _count_from_nothing(self) -> None:
        """Forget what an attempt counted that was given up."""
        self.latents_read = None
        self.lookups, self.misses, self.why_missed = 0, 0, Counter[str]()
        self._answered, self._missed = set[int](), set[int]()
        self.coarse.taken.clear()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.forget()
        if not self.session.turns.leave(self):
            return  # closed under way: the chunk may be tried again
        if kind is None and not is_off():
            self.session.prompts.scores.check_asked(self)
            self.coarse.tell()
        if self.session.measured is not None:
            self.session.measured.wait()
        seconds = time.perf_counter() - self._began
        record = record_of(self, seconds, compiled=current_report().graphs != self._graphs)
        if kind is None:
            self._finished = True
            self.session.finish(self)
            current_report().add_chunk(record)
            if self.session.measured is not None:
                self.session.measured.records.append(record)
            if not is_off():
                self.session.effect.add(record)
                if self.session.pace is not None:
                    self.session.pace.finished(record)
        self.session.events.chunk(record, self._began_ns, self._compiled, kind)
