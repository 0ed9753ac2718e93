"""Carry what no graph can show from the user's loop to the compiled model: chunks, poses, steps.

`Session` is the only stateful object of the project. Its state lives in the chunk and dies with
it. `lipass.runtime.scope` knows what is open where the model is being called.

    with lipass.Session(preset="all") as session:
        with session.chunk(poses=history_w2c, query=new_w2c, latents=history) as chunk:
            context = chunk.context
            for step in chunk.steps(sigmas):
                x = x + (step.sigma_next - step.sigma) * model(x, step.sigma, ...)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lipass.calibration.frontier import Frontier
from lipass.config import Config
from lipass.errors import LipassError
from lipass.parallel.agree import Alone, Ranks
from lipass.policy.holding import least_needed
from lipass.policy.indices import as_plain
from lipass.policy.latents import check_latents
from lipass.policy.plan import ChunkPlan, Once, plan_chunk
from lipass.policy.steering import Steering, asked
from lipass.policy.views import check_poses
from lipass.receipt import current_report
from lipass.runtime.chunk import Chunk
from lipass.runtime.effect import Effect
from lipass.runtime.events import Events, Sink
from lipass.runtime.given import GivenChunks
from lipass.runtime.measured import Measured
from lipass.runtime.merged_history import MergedHistories
from lipass.runtime.pace_target import opened
from lipass.runtime.prompts import Prompts
from lipass.runtime.replay import Replay
from lipass.runtime.results import Invariants
from lipass.runtime.scope import Block, current, current_chunk, current_step, enter, latest, leave
from lipass.runtime.snapshot import Resumable, Snapshot
from lipass.runtime.streams import Streamed
from lipass.runtime.turns import Turns
from lipass.runtime.written_slots import WrittenSlots
from lipass.switch import is_off

__all__ = ["Chunk", "Session", "current", "current_chunk", "current_step"]

_NOTHING = Config.resolve("off")


class Session(Streamed, Resumable):
    """One rollout, or several side by side in streams.

    Args:
        config: a resolved Config; or pass options instead.
        convention: how cameras are written: "w2c" or "c2w", "opencv" or "opengl" axes, joined by
            a dash; they are converted. Where a walk looks like another one, or like another unit
            than that of near and far, a warning says so once. All of it: docs/poses.md.
        events: where to write what chunks did, for a server to plot: a path, to which JSON lines
            are appended, or a function of one event; None takes the path in LIPASS_EVENTS, if
            there is one (docs/events.md).
        frontier: what `lipass calibrate` has written, whose options hold (docs/calibrate.md).
        target_chunk_ms: what a chunk may take: each is made at the best point of the frontier that
            keeps it, and measured times correct the choice.
        target_db: the fastest point is taken that had so many dB to the dense model; with a target
            of time, points below it are left out.
        group: a `torch.distributed.ProcessGroup` whose ranks make this rollout together, each by
            the same calls: what the first one decides holds on all of them (docs/stages.md).
        options: as in `Config.resolve`, e.g. `preset="all"`, `**{"context.overlap_min": 0.3}`.

    Raises:
        TypeError: a config beside options or a frontier, a config of another kind, or events that
            are neither a path nor a function.
        ValueError: options that `Config.resolve` refuses.
    """

    def __init__(
        self,
        config: Config | None = None,
        /,
        *,
        convention: str = "w2c-opencv",
        events: Sink | None = None,
        group: Any = None,
        frontier: str | os.PathLike[str] | Frontier | None = None,
        target_chunk_ms: float | None = None,
        target_db: float | None = None,
        **options: Any,
    ) -> None:
        self.config, self.pace = opened(config, options, frontier, target_chunk_ms, target_db)
        self.ranks = Alone() if group is None else Ranks(group, self.config.fingerprint())
        self.given = GivenChunks(self.config, convention)
        self.number = current_report().open_session()
        self.effect = Effect(self.config, self.number)
        self.turns = Turns()
        self.measured: Measured | None = None
        self.events = Events(events, self.number, self.config)
        self.invariants = Invariants()
        self.histories = MergedHistories(self)
        self.written = WrittenSlots()
        self.prompts = Prompts()
        self.recorded: Replay | None = None
        self._blocks: list[Block] = []

    @classmethod
    def replay(
        cls, plans: Iterable[ChunkPlan] | Snapshot, config: Config | None = None
    ) -> Session:
        """Make a session whose chunks follow recorded plans; poses are not needed.

        Args:
            plans: in order, of any number of streams; or a snapshot, which has them and a config.
            config: that of the recording, for all that plans do not hold: how sparse attention is
                and in which roles, and steps of a plan recorded before `Chunk.steps`. Without one
                `lipass.attend` is dense, and a graph that is sparse tells so, or refuses under
                `strict`.

        Raises:
            TypeError: something else than plans.
            ValueError: another config than that of the snapshot.
        """
        if isinstance(plans, Snapshot):
            config = plans.agreed(config, {})
            plans = plans.plans
        session = cls(config) if config is not None else cls(preset="off")
        session.recorded, session.prompts = Replay(plans), Prompts(recorded=True)
        return session

    def chunk(
        self,
        *,
        poses: Tensor | None = None,
        query: Tensor | None = None,
        latents: Tensor | None = None,
        own_context: Sequence[int] | None = None,
        held: Sequence[int] | Tensor | None = None,
        stream: str = "main",
    ) -> Chunk:
        """Decide about the next chunk of a stream.

        Reads `poses` and two numbers of `latents` back to the host: decisions are taken there,
        once a chunk.

        Args:
            poses: `[M, 4, 4]` cameras of all history latents, one each, oldest first, in the
                session's convention (world to camera, x right, y down, z ahead, unless it says
                otherwise) and the unit of near and far (metres); None for a first chunk without
                history.
            query: `[q, 4, 4]` of the latents to generate, `chunk_latents` of them; None for models
                without cameras, whose history is chosen by `latents` alone (a first chunk of
                theirs has neither).
            latents: `[M, ...]` history, for the latent dynamics; None leaves the window longest.
            own_context: indices that the loop reads by itself, used while the context policy is
                off; None reads all of the history.
            held: indices that the model still holds, such as what is left in a rolled cache, in
                the order in which its keys lie; of a ring in the order of its slots, without those
                that this chunk takes. Nothing else is chosen. None holds all of the history,
                oldest first.
            stream: name of the request; chunks of different streams may be open at once.

        Raises:
            TypeError: tensors of the wrong kind.
            ValueError: tensors that do not fit; the session stays as it was.
            LipassError: the session is closed, the stream has an open chunk, a replay ended, or
                ranks that share the session ask for different chunks.
        """
        with self.ranks.together():
            index, there = self.turns.next(stream), as_plain(held)
            if self.recorded is not None:
                plan = self.recorded.next(self.config, stream, poses, there)
                return Chunk(self, plan, there)
            poses, query = self.given.checked(poses, query, latents, stream, index)
            if latents is not None:
                check_latents(latents)
            if self.measured is not None:
                self.measured.latents = latents
            plan_at = functools.partial(
                plan_chunk,
                poses=poses,
                query=query,
                latents=latents,
                own_context=own_context,
                stream=stream,
                index=index,
                held=there,
                once=Once(),
            )
            decide = functools.partial(plan_at, _NOTHING if is_off() else self.config)
            if self.pace is not None and not is_off():
                decide = functools.partial(self.pace.plan, plan_at)
            plan = self.ranks.plan(
                lambda: self.prompts.plan(decide(), there),
                stream=stream,
                chunk=index,
                history=[len(one) for one in (poses, latents) if one is not None],
                prompts=self.prompts.count(stream),
            )
            self.turns.check_history(stream, plan.history_latents)
            self.given.weigh(plan.context.power)
            return Chunk(self, plan, there)

    def steer(
        self, text: Any, over_chunks: int = 4, policy: str | Steering | None = None, *,
        stream: str = "main",
    ) -> None:  # fmt: skip
        """Change the prompt from the next chunk on; `chunk.text` is what to pass to the model.

        Args:
            text: as the model takes it: embeddings, or keys and values, in lists, tuples or dicts.
                The first one is shown from the first chunk on; a replay takes nothing else.
            over_chunks: chunks that the change takes.
            policy: one of `Steering.policy`, or a `lipass.Steering`. None is "two-prompt" where
                this session has the option `steering`, as its graphs then do, and else "slerp".
            stream: name of the request.

        Raises:
            TypeError, ValueError: what is no text, unlike the one before, or no change.
            LipassError: the session is closed, or has made chunks without a prompt.
        """
        index = self.turns.upcoming(stream)
        steering = asked(policy, over_chunks, attention_asks=self.config.steering is not None)
        self.prompts.steer(text, steering, stream, index)

    def least_needed(self, poses: Tensor) -> int:
        """Say which chunk a full cache can spare: the one whose views the others show best.

        Tell `held` to the chunks that follow.

        Args:
            poses: `[n, 4, 4]` cameras of the latents that the cache holds, oldest first, in the
                session's convention.

        Returns:
            Position in `poses` of the first of the `chunk_latents` latents to give up.

        Raises:
            ValueError: cameras that are none, no whole chunks, or none beside sink and window.
            LipassError: the context policy is off.
        """
        if self.config.context is None:
            raise LipassError(
                f"what is least needed is up to the context policy, which preset "
                f"{self.config.preset!r} has not; use 'context' or 'all', or give up the oldest"
            )
        with self.ranks.together():
            cameras = check_poses(None, self.given.convention.to_w2c(poses))[1]
            decide = functools.partial(least_needed, cameras, self.config.context)
            return self.ranks.number(decide, held=len(cameras))

    def close(self) -> None:
        """Forget everything but the receipt; calling it twice is fine."""
        for chunk in tuple(self.open_chunks.values()):
            chunk.forget()
        for known in (self.turns, self.invariants, self.histories, self.written, self.prompts):
            known.clear()
        self.recorded = None
        if not self.turns.closed:
            self.turns.closed = True
            self.events.close()
            self.effect.tell()

    def config_of(self, plan: ChunkPlan) -> Config:
        """Return the options that a chunk was planned with."""
        return (self.pace and self.pace.config(plan)) or self.config

    def finish(self, chunk: Chunk) -> None:
        """Count a chunk that was generated to its end."""
        stream = chunk.plan.stream
        self.turns.finish(chunk)
        self.given.finished(stream)
        self.prompts.finished(chunk.plan)
        if self.recorded is not None:
            self.recorded.finished(stream)

    def __enter__(self) -> Session:
        if self.turns.closed:
            raise LipassError("a session is entered while open, got a closed one; make a new one")
        block = Block(self)
        enter(block)
        self._blocks.append(block)
        return self

    def __exit__(self, *error: object) -> None:
        block = latest(self._blocks)
        self._blocks.remove(block)
        leave(block)
        self.effect.told |= error[0] is not None
        if not self._blocks:
            self.close()
