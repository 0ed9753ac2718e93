"""Run each stage in a process of its own; the caller says who hands what to whom, and when.

One thread of the caller listens to all processes, and to their end. Bytes go from stage to stage
over `torch.distributed`; who does what goes through pipes, whose end cannot be missed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import multiprocessing.util  # its own hook at exit, which waits for processes, must run after ours
import os
import threading
import weakref
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

from lipass.errors import LipassError
from lipass.stages.line import Line
from lipass.stages.packet import Packet
from lipass.stages.processes import Processes, Rank
from lipass.stages.stage import Stage
from lipass.stages.worker import Failure


class Apart(Line):
    """Stages side by side."""

    def __init__(self, stages: tuple[Stage, ...], depth: int, direct: bool) -> None:
        super().__init__(stages, depth)
        self.ahead = len(stages) + depth
        self._inbox: list[tuple[int, Packet]] = []
        self._moving = False
        self._heard, self._wake = multiprocessing.Pipe(duplex=False)
        named = tuple(replace(one, make=one.importable()) for one in stages)
        self._processes = Processes(named, direct)
        self._ranks = self._processes.ranks
        self._at_exit = _close_at_exit(weakref.ref(self))
        self._thread = threading.Thread(target=self._run, name="lipass-stages", daemon=True)
        self._thread.start()

    def has_room(self) -> bool:  # noqa: D102
        in_front = len(self._inbox) + len(self._ranks[0].waiting)
        return in_front < self.depth and super().has_room()

    def works(self) -> bool:  # noqa: D102
        return self._moving or any(one.works for one in self._ranks) or self._can_move()

    def accept(self, number: int, packet: Packet) -> None:  # noqa: D102
        self._inbox.append((number, packet))
        self._nudge()

    def taken(self) -> None:  # noqa: D102
        self._nudge()

    def gave_up(self) -> None:  # noqa: D102
        self._inbox.clear()
        for one in self._ranks:
            one.waiting.clear()
            one.held = None
            one.tell("forget", self.shown)

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send_bytes(b"")

    def _run(self) -> None:
        """Move what can be moved, and listen, until the line is closed or has failed."""
        try:
            while not self._over:
                if not self._move():
                    self._listen()
        except LipassError as error:
            self._fail(error)
        except Exception as error:  # of a transfer, mostly: its other end was lost
            if not self._over:
                self._fail(self._ended(error))

    @property
    def _over(self) -> bool:
        return self.closed or self.failed is not None

    def _can_move(self) -> bool:
        return self._next_move() is not None

    def _next_move(self) -> int | None:
        """Return the rank that can hand over now, the last one first; 0 is the caller."""
        ranks = self._ranks
        for rank in range(len(ranks), 0, -1):
            if (held := ranks[rank - 1].held) is None:
                continue
            last = rank == len(ranks)
            ahead = self.results if last else ranks[rank].waiting
            # Failures of later items, which overtake it, may lie in the way of the next result.
            if len(ahead) < self.depth or (last and held[0] == self.next_out):
                return rank
        return 0 if self._inbox and len(ranks[0].waiting) < self.depth else None

    def _move(self) -> bool:
        """Hand one item over; False if there is none to hand over."""
        with self.cond:
            source = self._next_move()
            if source is None:
                return False
            number, text, own = self._tell_both(source)
            self._moving = True
        try:
            if own is not None:
                self._processes.channel.send(own, 1)
            elif source == len(self._ranks):
                packet = self._processes.channel.receive(text, source)
                with self.cond:
                    if number >= self.next_out:
                        self.results[number] = packet
        finally:
            with self.cond:
                self._moving = False
                self.cond.notify_all()
        return True

    def _tell_both(self, source: int) -> tuple[int, str, Packet | None]:
        """Say to both ends of a transfer that it is next; return what the caller has to send."""
        own = None
        if source == 0:
            number, own = self._inbox.pop(0)
            text = own.text
        else:
            held, self._ranks[source - 1].held = self._ranks[source - 1].held, None
            assert held is not None
            number, text = held
            to = (source + 1) % (len(self._ranks) + 1)
            self._ranks[source - 1].tell("send", to)
        if source < len(self._ranks):
            self._ranks[source].waiting.add(number)
            self._ranks[source].tell("take", number, source, text)
        return number, text, own

    def _listen(self) -> None:
        """Wait until somebody says something, or ends."""
        sentinels = [one.process.sentinel for one in self._ranks]
        said = wait([self._heard, *(one.pipe for one in self._ranks), *sentinels])
        if not self._over and any(one in said for one in sentinels):
            raise self._ended()
        with self.cond:
            if self._over:
                return  # who ends the processes hears what they say of it
            if self._heard in said:
                self._heard.recv_bytes()
            for one in self._ranks:
                if one.pipe in said:
                    self._hear(one, *json.loads(one.pipe.recv_bytes()))
            self.cond.notify_all()

    def _hear(self, rank: Rank, word: str, *told: Any) -> None:
        if word == "ended":  # nobody has asked it to: it has lost a neighbour
            raise self._ended()
        if word in ("closing", "unclosed"):
            rank.note(word, *told)
            return
        number, *rest = told
        rank.waiting.discard(number)
        rank.busy = number if word == "began" else None
        if number < self.next_out:
            return
        if word == "done":
            rank.held = (number, rest[0])
        elif word == "failed":
            self.results[number] = Failure(rank.stage.name, *rest)

    def _ended(self, error: object = None) -> LipassError:
        return self._processes.ended(self.under_way, error)

    def _fail(self, error: LipassError) -> None:
        with self.cond:
            if self.closed:
                return
            self.failed = error
            self.cond.notify_all()
        self._processes.end(self.given)

    def close(self, timeout_s: float | None = None) -> None:  # noqa: D102
        with self.cond:
            if self.closed:
                return
            self.closed = True
            self.cond.notify_all()
        self._nudge()
        failed = self._processes.end(self.given, timeout_s)
        self._thread.join()
        for end in (self._heard, self._wake, *(one.pipe for one in self._ranks)):
            end.close()
        atexit.unregister(self._at_exit)
        if failed is not None and self.failed is None:
            raise failed


def _close_at_exit(line: weakref.ref[Apart]) -> Any:
    """Have a line closed at exit that nobody has closed."""
    owner = os.getpid()

    def close() -> None:
        found = line()
        if found is not None and os.getpid() == owner:
            with contextlib.suppress(Exception):
                found.close()

    return atexit.register(close)
