"""Hold items to their order, and say who has to wait: what both kinds of lines share."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from lipass.errors import LipassError
from lipass.stages.now import Job
from lipass.stages.packet import Packet, pack
from lipass.stages.stage import Stage
from lipass.stages.worker import Failure, Worker


class StageError(LipassError):
    """Report that a stage raised; its traceback is in the message.

    Attributes:
        stage: name of the stage.
        number: which item it was computing, counted from 0.
        kind: class of what it raised.
    """

    def __init__(self, stage: str, number: int, kind: str, told: str) -> None:
        self.stage, self.number, self.kind = stage, number, kind
        super().__init__(
            f"a stage must compute every item, got {kind} from stage {stage!r} at item {number}; "
            f"the items behind go on. It says:\n{told}"
        )


class Line(ABC):
    """Items by number: given, under way, there to be taken, taken or forgotten."""

    def __init__(self, stages: tuple[Stage, ...], depth: int) -> None:
        self.stages = stages
        self.depth = depth
        self.cond = threading.Condition()
        self.given = 0
        """Number of the next item."""
        self.next_out = 0
        """Number of the next result."""
        self.shown = -1
        """Number of the latest result that was taken."""
        self.results: dict[int, Packet | Failure] = {}
        self.failed: LipassError | None = None
        self.closed = False

    @property
    def under_way(self) -> int:
        """Items that were put and neither taken nor forgotten."""
        return self.given - self.next_out

    @property
    def ready(self) -> bool:
        """Whether the next result is there."""
        return self.next_out in self.results

    def put(self, packet: Packet, timeout_s: float) -> None:
        """Add an item; waits for room as `Stages.put` says."""
        with self.cond:
            self._wait(self.has_room, timeout_s)
            if not self.has_room():
                raise LipassError(
                    f"a line of {len(self.stages)} stages and depth {self.depth} must have room "
                    f"for an item, got one more behind {self.under_way} that nobody takes; take "
                    "one with get() first, or wait for another thread with timeout_s"
                )
            self.accept(self.given, packet)
            self.given += 1
            self.cond.notify_all()

    def get(self, timeout_s: float) -> Packet:
        """Take the next result; waits for it as `Stages.get` says."""
        with self.cond:
            self._wait(lambda: self.ready, timeout_s)
            if not self.ready:
                raise LipassError(
                    "a result must be under way to be taken, got none; put an item first, or "
                    "wait for another thread with timeout_s"
                )
            number = self.next_out
            found = self.results.pop(number)
            self.next_out += 1
            self.cond.notify_all()
            self.taken()
            if isinstance(found, Failure):
                raise StageError(found.stage, number, found.kind, found.told)
            self.shown = number
            return found

    def forget(self) -> int:
        """Give up what was not taken; return how many items."""
        with self.cond:
            self.check()
            count = self.under_way
            self.next_out = self.given
            self.results.clear()
            if count:
                self.gave_up()
            self.cond.notify_all()
            return count

    def check(self) -> None:
        """Raise where nothing can go on."""
        if self.failed is not None:
            raise self.failed
        if self.closed:
            raise LipassError("a line must be open, got a closed one; make the stages anew")

    def _wait(self, done: Any, timeout_s: float) -> None:
        """Wait while stages work; where all of them wait for the caller, `timeout_s` longer."""
        idle_since: float | None = None
        while True:
            self.check()
            if done():
                return
            if self.works():
                idle_since = None
                self.cond.wait()
                continue
            idle_since = time.monotonic() if idle_since is None else idle_since
            left = idle_since + timeout_s - time.monotonic()
            if left <= 0:
                return
            self.cond.wait(min(left, threading.TIMEOUT_MAX))

    def has_room(self) -> bool:
        """Whether an item may be put: every stage can compute one and have `depth` in front."""
        return self.under_way < len(self.stages) * (self.depth + 1) + self.depth

    @abstractmethod
    def works(self) -> bool:
        """Whether a stage is computing, or will without anybody's help."""

    @abstractmethod
    def accept(self, number: int, packet: Packet) -> None:
        """Take over an item."""

    @abstractmethod
    def taken(self) -> None:
        """Learn that a result has left."""

    @abstractmethod
    def gave_up(self) -> None:
        """Learn that everything in front of `given` is stale."""

    @abstractmethod
    def close(self, timeout_s: float | None = None) -> None:
        """End it, as `Stages.close` says; a second call does nothing."""


class Here(Line):
    """All stages in this process, one after the other, when a result is asked for."""

    ahead = 1
    """Items that are best under way at once: no more, as nothing computes in between."""

    def __init__(self, stages: tuple[Stage, ...], depth: int) -> None:
        super().__init__(stages, depth)
        self.workers = [Worker(one) for one in stages]
        # By number: how many stages an item has passed, and what the latest one gave. An item is
        # taken away when its result is laid down, so that Ctrl-C in between loses none.
        self._waiting: dict[int, tuple[int, Packet | Failure]] = {}
        self._job: Job | None = None
        self._to_forget = False
        # One item at a time, whichever threads ask.
        self._turn = threading.Lock()

    def works(self) -> bool:  # noqa: D102
        return False

    def accept(self, number: int, packet: Packet) -> None:  # noqa: D102
        self._waiting[number] = 0, packet

    def taken(self) -> None:
        """Nothing waits for that here."""

    def gave_up(self) -> None:  # noqa: D102
        self._waiting.clear()
        self._to_forget = True
        if self._job is not None:
            self._job.stale = True

    def get(self, timeout_s: float) -> Packet:  # noqa: D102
        with self._turn:
            while True:
                with self.cond:
                    self._wait(lambda: self.under_way > 0, timeout_s)
                    if self.ready or not self.under_way:
                        return super().get(0.0)
                self._compute()

    def _compute(self) -> None:
        with self.cond:
            if not self._waiting:
                return
            job = self._job = Job(self.next_out)
            passed, found = self._waiting[job.number]
            forget, self._to_forget = self._to_forget, False
        try:
            if forget:
                found = self._tell_to_forget() or found
            for worker in self.workers[passed:]:
                if job.stale or isinstance(found, Failure):
                    break
                found, passed = worker.compute(job, found), passed + 1
                with self.cond:
                    if not job.stale:
                        self._waiting[job.number] = passed, found
            with self.cond:
                if not job.stale:
                    self.results[job.number] = found
                    del self._waiting[job.number]
        finally:
            self._job = None

    def _tell_to_forget(self) -> Failure | None:
        """Tell all stages what nobody has seen; who was told has nothing more to forget."""
        try:
            told = [one.forget(self.shown) for one in self.workers]
        except BaseException:
            self._to_forget = True
            raise
        return next((one for one in told if one is not None), None)

    def close(self, timeout_s: float | None = None) -> None:  # noqa: D102
        with self.cond:
            if self.closed:
                return
            self.closed = True
            if self._job is not None:
                self._job.stale = True
            self.cond.notify_all()
        # An item that is being computed is finished first; what raises does so behind the others.
        with self._turn, contextlib.ExitStack() as stack:
            for one in self.workers:
                stack.callback(one.close)


def items_of(line: Line, ahead: int, items: Iterator[Any]) -> Iterator[Packet]:
    """Put items as there is room, and give the results in order."""
    for item in items:
        line.put(pack(item), 0.0)
        while line.ready or line.under_way >= ahead:
            yield line.get(0.0)
    while line.under_way:
        yield line.get(0.0)
