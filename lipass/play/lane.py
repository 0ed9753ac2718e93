"""A lane: one thread that computes chunks for everybody, one a turn, and nobody twice in a row.

The fast and the dense side have a lane each where the machine has cores for both, so that the fast
one never waits for the other. On one core both share a lane, and take turns by chunk. A lane that
yields leaves the core to whoever answers a visitor: sockets and the other lane.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

# By how much a lane yields: enough to be last, and no share of an idle core is lost.
_NICE = 5


class Job(Protocol):
    """Somebody for whom chunks are made."""

    def due(self, side: str) -> float | None:
        """Return since when a chunk of a side waits, by `time.monotonic`; None if none does."""

    def make(self, side: str) -> None:
        """Make one chunk of a side; must not raise."""


class Lane:
    """A thread that makes the chunks of some sides.

    Args:
        sides: whose chunks it makes.
        yields: whether its thread is of lower priority, where the system has such threads.
    """

    def __init__(self, sides: Sequence[str], *, yields: bool = False) -> None:
        self.sides = tuple(sides)
        self._yields = yields
        self._jobs: list[tuple[Job, str]] = []
        self._changed = threading.Condition()
        self._closed = False
        name = f"lipass-play-{'-'.join(sides)}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def add(self, job: Job) -> None:
        """Let somebody take part."""
        with self._changed:
            self._jobs += [(job, side) for side in self.sides]
            self._changed.notify()

    def remove(self, job: Job) -> None:
        """Let somebody go; a chunk that is being made is finished first."""
        with self._changed:
            self._jobs = [one for one in self._jobs if one[0] is not job]

    def wake(self) -> None:
        """Look again who waits: something was asked for."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End the thread behind the chunk that it makes."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        if self._yields and sys.platform == "linux":  # elsewhere the whole process would yield
            thread = threading.get_native_id()
            nice = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, nice + _NICE)
        while (turn := self._next()) is not None:
            job, side = turn
            job.make(side)

    def _next(self) -> tuple[Job, str] | None:
        """Wait for the next turn; who had it goes to the end of the line."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                waits = [(job.due(side), (job, side)) for job, side in self._jobs]
                for since, turn in waits:
                    if since is not None and since <= now:
                        self._jobs.remove(turn)
                        self._jobs.append(turn)
                        return turn
                self._changed.wait(_until(now, (since for since, _ in waits)))
        return None


def _until(now: float, dues: Iterable[float | None]) -> float | None:
    """Seconds to the first chunk that will be due; None if nobody waits."""
    coming = [due - now for due in dues if due is not None]
    return max(min(coming), 0.0) if coming else None
