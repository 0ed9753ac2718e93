"""Carry what no graph can show from the user's loop to the compiled model: chunks, poses, steps.

`Session` is the only stateful object of the project. Its state is keyed by stream, chunk and
region, lives in the chunk and dies with it. `lipass.runtime.scope` knows what is open where the
model is being called.

    with lipass.Session(preset="all") as session:
        with session.chunk(poses=history_w2c, query=new_w2c, latents=history) as chunk:
            context = chunk.context
            for step in chunk.steps(sigmas):
                x = x + (step.sigma_next - step.sigma) * model(x, step.sigma, ...)
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor

from lipass.config import Config
from lipass.errors import LipassError
from lipass.policy.plan import ChunkPlan, plan_chunk, with_steps
from lipass.policy.steps import PlannedStep, StepPlan, all_taken, plan_steps
from lipass.receipt import ChunkRecord, current_report
from lipass.runtime.effect import Effect
from lipass.runtime.given import GivenChunks
from lipass.runtime.invariants import InvariantStore
from lipass.runtime.schedule import Schedule
from lipass.runtime.scope import Branch, enter, leave, open_items
from lipass.runtime.step import Step, StepState


class Session:
    """One rollout, or several side by side in streams.

    Args:
        config: a resolved Config; or pass options instead.
        convention: how cameras are written: "w2c" or "c2w", "opencv" or "opengl" axes, joined by
            a dash; they are converted.
        options: as in `Config.resolve`, e.g. `preset="all"`, `**{"context.overlap_min": 0.3}`.

    Raises:
        TypeError: both a config and options, or a config of another kind.
        ValueError: options that `Config.resolve` refuses.
    """

    def __init__(
        self, config: Config | None = None, /, *, convention: str = "w2c-opencv", **options: Any
    ) -> None:
        if config is not None and not isinstance(config, Config):
            raise TypeError(
                f"config must be a lipass.Config, got {config!r}; write Session(preset='all')"
            )
        if config is not None and options:
            raise TypeError(
                f"a session takes a config or options, got both (options {sorted(options)}); "
                "put the options into Config.resolve"
            )
        self.config = config if config is not None else Config.resolve(None, options)
        self.given = GivenChunks(self.config, convention)
        self.number = current_report().open_session()
        self.effect = Effect(self.config, self.number)
        self._chunks: dict[str, int] = {}
        self._open: dict[str, Chunk] = {}
        self.invariants = InvariantStore()
        self._replay: dict[str, deque[ChunkPlan]] | None = None
        self._entered = 0
        self._closed = False

    @classmethod
    def replay(cls, plans: Iterable[ChunkPlan], config: Config | None = None) -> Session:
        """Make a session whose chunks follow recorded plans; poses are not needed.

        Args:
            plans: in order, of any number of streams.
            config: for what plans do not hold (steps of a plan recorded before `Chunk.steps`).
        """
        session = cls(config) if config is not None else cls(preset="off")
        session._replay = {}
        for plan in plans:
            session._replay.setdefault(plan.stream, deque()).append(plan)
        return session

    def chunk(
        self,
        *,
        poses: Tensor | None = None,
        query: Tensor | None = None,
        latents: Tensor | None = None,
        own_context: Sequence[int] | None = None,
        stream: str = "main",
    ) -> Chunk:
        """Decide about the next chunk of a stream.

        Reads `poses` and one number of `latents` back to the host: decisions are taken there, once
        a chunk.

        Args:
            poses: `[M, 4, 4]` cameras of all history latents in the session's convention, oldest
                first; None for a first chunk without history.
            query: `[q, 4, 4]` of the latents to generate.
            latents: `[M, ...]` history, for the latent dynamics; None leaves the window longest.
            own_context: indices that the loop reads by itself, used while the context policy is
                off; None reads all of the history.
            stream: name of the request; chunks of different streams may be open at once.

        Raises:
            TypeError: tensors of the wrong kind.
            ValueError: tensors that do not fit; the session stays as it was.
            LipassError: the session is closed, the stream has an open chunk, or a replay ended.
        """
        if self._closed:
            raise LipassError("a chunk needs an open session, got a closed one; make a new one")
        if stream in self._open:
            raise LipassError(
                f"a stream has one chunk at a time, got a second for {stream!r}; leave the first "
                "`with session.chunk(...)` block, or name another stream"
            )
        index = self._chunks.get(stream, 0)
        if self._replay is not None:
            return Chunk(self, self._recorded(stream, poses))
        if query is None:
            raise ValueError("query must hold the new latents' cameras, got None; pass [q, 4, 4]")
        poses, query = self.given.checked(poses, query, stream, index)
        plan = plan_chunk(
            self.config,
            poses=poses,
            query=query,
            latents=latents,
            own_context=own_context,
            stream=stream,
            index=index,
        )
        return Chunk(self, plan)

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Keep the stored outputs of the model calls inside apart, e.g. those of a CFG branch.

        Branches share the chunk and its plan. Without this, calls are told apart by their order
        within a step.
        """
        branch = Branch(self, name)
        enter(branch)
        try:
            yield
        finally:
            leave(branch)

    def close(self) -> None:
        """Forget everything but the receipt; calling it twice is fine."""
        for chunk in tuple(self._open.values()):
            chunk._forget()
        self._open.clear()
        self._chunks.clear()
        self.invariants.clear()
        self._replay = None
        if not self._closed:
            self._closed = True
            self.effect.tell()

    def _recorded(self, stream: str, poses: Tensor | None) -> ChunkPlan:
        assert self._replay is not None
        left = self._replay.get(stream)
        if not left:
            raise LipassError(
                f"a replay has as many chunks as were recorded, got one more for {stream!r}; "
                f"recorded streams: {', '.join(self._replay) or 'none'}"
            )
        if poses is not None and len(poses) != left[0].history_latents:
            raise ValueError(
                f"a replayed chunk must have the recorded history, got {len(poses)} latents for "
                f"{left[0].history_latents}; replay with the trajectory it was recorded on"
            )
        return left[0]

    def __enter__(self) -> Session:
        if self._closed:
            raise LipassError("a session is entered while open, got a closed one; make a new one")
        self._entered += 1
        enter(self)
        return self

    def __exit__(self, *error: object) -> None:
        leave(self)
        self._entered -= 1
        self.effect.told |= error[0] is not None
        if self._entered == 0:
            self.close()


class Chunk:
    """One chunk of a stream; made by `Session.chunk`, used in a `with` block.

    Attributes:
        session: the session it belongs to.
        plan: its decisions.
    """

    def __init__(self, session: Session, plan: ChunkPlan) -> None:
        self.session = session
        self.plan = plan
        self.active: StepState | None = None
        self.lookups = 0
        self.misses = 0
        self.latents_read: int | None = None
        self._stored: dict[tuple[str, str, int], Any] = {}
        self._began = 0.0

    @property
    def index(self) -> int:
        """Chunks of the stream before this one."""
        return self.plan.index

    @property
    def context(self) -> list[int]:
        """History latents that the model reads, ascending."""
        return self.plan.context.indices

    def steps(self, sigmas: Sequence[float] | Tensor | Any) -> Iterator[Step]:
        """Iterate over the denoising steps that the sampler takes.

        In the "merge" form only computed steps come, each reaching over the reused ones behind it;
        in the "lookup" form all come, and the compiled model answers the reused ones itself.

        Args:
            sigmas: `steps + 1` noise levels, the last one included; a tensor is read on the CPU
                only. Or a scheduler of diffusers after `set_timesteps`, which takes all steps
                itself, `x = scheduler.step(v, step.timestep, x).prev_sample`: form "lookup".

        Raises:
            ValueError: fewer than two levels, one that is not finite, timesteps in place of
                sigmas, or a scheduler that has no timesteps yet.
        """
        schedule = Schedule.of(sigmas)
        plan = self.step_plan(schedule.steps)
        if schedule.form is not None:
            plan = all_taken(plan, schedule.why_all)
            self.plan = with_steps(self.plan, plan)
        return self._iterate(plan.sequence(), schedule)

    def step_plan(self, total: int) -> StepPlan:
        """Decide which of `total` steps compute, for a loop that is inside the compiled graph.

        Raises:
            ValueError: another number than the chunk was asked for before.
        """
        if self.plan.steps is None:
            options, revisit = self.session.config.steps, self.plan.revisit
            steps = plan_steps(total, options, allowed=revisit.allowed, reason=revisit.reason)
            self.plan = with_steps(self.plan, steps)
        assert self.plan.steps is not None
        if self.plan.steps.total != total:
            raise ValueError(
                f"a chunk has one number of steps, got {total} after {self.plan.steps.total}; "
                "pass sigmas of the same length"
            )
        return self.plan.steps

    def _iterate(self, sequence: tuple[PlannedStep, ...], schedule: Schedule) -> Iterator[Step]:
        self._stored.clear()
        try:
            for place, planned in enumerate(sequence):
                # An output is kept only where the next step will ask for it.
                wanted = place + 1 < len(sequence) and sequence[place + 1].reused
                state = StepState(self, planned.index, planned.reused, keeps=wanted)
                self.active = state
                yield Step(
                    index=planned.index,
                    sigma=schedule.level(planned.index),
                    sigma_next=schedule.level(planned.next_index),
                    timestep=schedule.timestep(planned.index),
                    reused=planned.reused,
                    state=state,
                )
        finally:
            self.active = None
            self._stored.clear()

    def __enter__(self) -> Chunk:
        streams = self.session._open
        if self.plan.stream in streams:
            raise LipassError(
                f"a stream has one chunk at a time, got a second for {self.plan.stream!r}; leave "
                "the first block, or name another stream"
            )
        streams[self.plan.stream] = self
        self._began = time.perf_counter()
        enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        leave(self)
        self._forget()
        session = self.session
        if session._open.pop(self.plan.stream, None) is None or kind is not None:
            return  # closed under way, or failed: the chunk may be tried again
        session._chunks[self.plan.stream] = self.plan.index + 1
        session.given.finished(self.plan.stream)
        if session._replay is not None:
            session._replay[self.plan.stream].popleft()
        seconds = time.perf_counter() - self._began
        record = ChunkRecord(
            session.number, self.plan, seconds, self.lookups, self.misses, self.latents_read
        )
        current_report().add_chunk(record)
        session.effect.add(record)

    def _forget(self) -> None:
        self.active = None
        self._stored.clear()


def current() -> Session | None:
    """Give the session of the innermost open step, chunk or session; None outside of all."""
    for item in reversed(open_items()):
        if isinstance(item, Session):
            return item
        if isinstance(item, StepState):
            return item.chunk.session
        if isinstance(item, Chunk):
            return item.session
    return None


def current_chunk() -> Chunk | None:
    """Give the chunk of the innermost open step or chunk; None outside of chunks."""
    for item in reversed(open_items()):
        if isinstance(item, StepState):
            return item.chunk
        if isinstance(item, Chunk):
            return item
    return None


def current_step() -> StepState | None:
    """Give the step that a model call belongs to; None outside of steps.

    Raises:
        LipassError: steps of several chunks are open and none is entered with `with step:`.
    """
    states = []
    for item in reversed(open_items()):
        if isinstance(item, StepState):
            return item
        if isinstance(item, Chunk) and item.active is not None:
            states.append(item.active)
    if len(states) > 1:
        names = ", ".join(repr(state.chunk.plan.stream) for state in reversed(states))
        raise LipassError(
            f"a model call must belong to one step, got open steps of streams {names}; "
            "call the model inside `with step:`"
        )
    return states[0] if states else None
