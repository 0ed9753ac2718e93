"""Run one stage in a process of its own.

The main thread computes. A second one does what the caller says: it takes items, sends results,
forgets and ends. Transfers run in the order in which the caller has told both ends of each of
them, one order for all processes, so none waits for one that waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lipass.stages.channel import Channel
from lipass.stages.now import Job
from lipass.stages.packet import Packet
from lipass.stages.stage import Stage
from lipass.stages.worker import Failure, Worker

# Longest that a stage may go on computing when nobody is left to take what it makes.
_GRACE_S = 10.0


@dataclasses.dataclass(frozen=True)
class Place:
    """What a process has to know."""

    stage: Stage
    rank: int
    size: int
    threads: int
    folder: Path
    direct: tuple[str, ...] | None


def serve(place: Place, pipe: Connection) -> None:
    """Make the stage and compute until the caller ends it or has ended itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who closes
    torch.set_num_threads(place.threads)
    say = _Say(pipe)
    say("here")
    channel = Channel(place.folder, place.rank, place.size, place.direct)
    try:
        worker = Worker(place.stage)
    except Exception as error:
        failure = Failure.of(place.stage.name, error)
        say("unmade", failure.kind, failure.told)
        return
    desk = _Desk(say)
    listener = threading.Thread(
        target=_listen, args=(desk, pipe, channel, place), name="lipass-stage", daemon=True
    )
    listener.start()
    say("ready")
    _compute_all(desk, worker, channel.device_to((place.rank + 1) % place.size))
    say("closing")
    try:
        worker.close()
    except Exception as error:
        failure = Failure.of(place.stage.name, error)
        say("unclosed", failure.kind, failure.told)
    say("ended")


class _Say:
    """Tell the caller something, from either thread; nobody listens where it has ended."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def __call__(self, *words: Any) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._pipe.send_bytes(json.dumps(words).encode())


class _Desk:
    """What lies between both threads: items to compute, and one result to be fetched.

    Nothing is said while it is locked: the caller may have more to say than a pipe holds, and is
    heard by the other thread, which needs the desk.
    """

    def __init__(self, say: _Say) -> None:
        self.say = say
        self._cond = threading.Condition()
        self._waiting: deque[tuple[int, Packet]] = deque()
        self._held: tuple[int, Packet] | None = None
        self._job: Job | None = None
        self._forget: int | None = None
        self._ended = False

    def next(self) -> tuple[Job, Packet, int | None] | None:
        """Begin the next item, once the result before it was fetched; None at the end."""
        with self._cond:
            while not self._ended and (not self._waiting or self._held is not None):
                self._cond.wait()
            if self._ended:
                return None
            number, packet = self._waiting.popleft()
            job = self._job = Job(number)
            forget, self._forget = self._forget, None
        self.say("began", number)
        return job, packet, forget

    def done(self, job: Job, found: Packet | Failure) -> None:
        """Lay down a result, unless nobody wants it."""
        with self._cond:
            self._job = None
            if isinstance(found, Packet) and not job.stale:
                self._held = (job.number, found)
        if job.stale:
            self.say("stale", job.number)
        elif isinstance(found, Failure):
            self.say("failed", job.number, found.kind, found.told)
        else:
            self.say("done", job.number, found.text)

    def add(self, number: int, packet: Packet) -> None:
        """Lay down an item."""
        with self._cond:
            self._waiting.append((number, packet))
            self._cond.notify_all()

    def fetch(self) -> Packet:
        """Take the result away."""
        with self._cond:
            assert self._held is not None
            (_, packet), self._held = self._held, None
            self._cond.notify_all()
            return packet

    def forget(self, shown: int) -> None:
        """Give up all that lies here."""
        with self._cond:
            self._waiting.clear()
            self._held = None
            self._forget = shown
            if self._job is not None:
                self._job.stale = True
            self._cond.notify_all()

    def end(self) -> None:
        """Compute nothing more."""
        with self._cond:
            self._ended = True
            if self._job is not None:
                self._job.stale = True
            self._cond.notify_all()


def _compute_all(desk: _Desk, worker: Worker, to: str) -> None:
    while (found := desk.next()) is not None:
        job, packet, shown = found
        failed = None if shown is None else worker.forget(shown)
        desk.done(job, failed or worker.compute(job, packet, to))


def _listen(desk: _Desk, pipe: Connection, channel: Channel, place: Place) -> None:
    """Do what the caller says until it ends the stage, or has ended."""
    if place.stage.device is not None and torch.device(place.stage.device).type == "cuda":
        torch.cuda.set_device(place.stage.device)
    try:
        while True:
            word, *rest = json.loads(pipe.recv_bytes())
            if word == "take":
                number, source, text = rest
                desk.add(number, channel.receive(text, source))
            elif word == "send":
                channel.send(desk.fetch(), *rest)
            elif word == "forget":
                desk.forget(*rest)
            else:
                assert word == "close", word
                break
    except (EOFError, OSError, RuntimeError):
        # The caller or a neighbour has ended. Whose fault it is, the caller sees.
        desk.end()
        last_call = threading.Timer(_GRACE_S, os._exit, (1,))
        last_call.daemon = True
        last_call.start()
        return
    desk.end()
