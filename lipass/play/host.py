"""Run one world for many visitors: compile it, share the cores out, let people in and out."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from lipass.cli.failures import raised
from lipass.errors import LipassError
from lipass.play.film import Films
from lipass.play.keep import Keep, Keeping
from lipass.play.lane import Lane
from lipass.play.protocol import Enter
from lipass.play.visitor import Out, Visitor, room_of
from lipass.play.vocabulary import Vocabulary
from lipass.play.voice import Voice
from lipass.play.world import DENSE, FAST, SIDES, World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """What is compiled.

    Attributes:
        ready: sides that are.
        doing: one line on what is compiled; "" when all is done.
    """

    ready: tuple[str, ...] = ()
    doing: str = ""


class Host:
    """A world that is being served.

    Attributes:
        name: of the process among others that serve the same world; "" where it is the only one.
        failure: what ended it, if something did; then `ended` is called.

    Args:
        world: what is served.
        visitors_max: who comes later is asked to wait.
        beside: whether both sides have a lane of their own; None decides by cores and device.
        threads: of one lane; None shares the cores out.
        voice: hears words of the world; None where nobody can speak to it.
        films: makes films of visits; None where none are made.
        keep: where visits are kept for who comes back.
        keep_chunks: whether each chunk is kept at once, as where the keep outlives this process;
            else a visit is kept when it ends.
        tell: is called, in any thread, whenever the status changes.

    Raises:
        LipassError: words or presets that a walk cannot hold.
    """

    def __init__(
        self,
        world: World,
        visitors_max: int = 16,
        *,
        beside: bool | None = None,
        threads: int | None = None,
        voice: Voice | None = None,
        films: Films | None = None,
        keep: Keeping | None = None,
        keep_chunks: bool = False,
        tell: Callable[[Status], None] = lambda status: None,
    ) -> None:
        self.world = world
        self.visitors_max = visitors_max
        self.beside = _has_cores_for_both() if beside is None else beside
        self.threads = threads or max(1, _cores() // (len(SIDES) if self.beside else 1))
        self.vocabulary = Vocabulary.of(world)
        self.name = ""
        self.status = Status()
        self.failure: LipassError | None = None
        self.ended: Callable[[], None] = lambda: None
        self.visitors: set[Visitor] = set()
        self.keep: Keeping = Keep() if keep is None else keep
        self.tell = tell
        self.voice, self.films = voice, films
        self._keep_chunks = keep_chunks
        self._lock = threading.Lock()
        self._entering, self._returning = threading.Lock(), threading.Lock()
        self._closing = False
        self._threads_before: int | None = None
        self._compiler = threading.Thread(
            target=self._compile, name="lipass-play-compile", daemon=True
        )
        self._coming = 0
        groups = [(FAST,), (DENSE,)] if self.beside else [SIDES]
        self._lanes = [Lane(sides, yields=sides == (DENSE,)) for sides in groups]

    def start(self) -> None:
        """Run in threads from now on; what is not compiled yet runs as it is."""
        import torch

        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        for lane in self._lanes:
            lane.start()
        self._compiler.start()

    def close(self) -> None:
        """Send everybody away and end the threads; a compilation ends with the process."""
        self._closing = True
        for visitor in tuple(self.visitors):
            self.leave(visitor)
        if self.voice is not None:
            self.voice.close()
        if self.films is not None:
            self.films.close()
        for lane in self._lanes:
            lane.close()
        if self._threads_before is not None:
            import torch

            torch.set_num_threads(self._threads_before)

    def enter(self, enter: Enter, out: Out) -> Visitor | None:
        """Let a visitor in; None where it is full. Takes a moment: not for an event loop.

        Who holds the ticket of a visitor that is here takes that place.

        Raises:
            LipassError: a ticket that is not known any more.
        """
        parts = self._take_over(enter.ticket) if enter.ticket else None
        if parts is None and not self._find_place():
            return None
        try:
            if enter.ticket:
                parts = parts or self.keep.get(enter.ticket)
                if FAST not in parts:
                    raise LipassError("a ticket must be of a visit that is kept, got an old one")
            room = self.world.room if enter.room is None else enter.room
            room = room_of(parts[FAST]) if parts else room
            with self._entering:  # one at a time, so that who walks already is not held up
                visit = self.world.visit(room)
                keep = self.keep if self._keep_chunks else None
                visitor = Visitor(self.world, room, visit, enter.walk, out, self.wake, keep)
                if parts:
                    self._restore(visitor, parts)
            with self._lock:
                self.visitors.add(visitor)
            return visitor
        finally:
            with self._lock:
                self._coming -= 1

    def _find_place(self) -> bool:
        """Take a place for somebody who comes, if one is free."""
        with self._lock:
            free = len(self.visitors) + self._coming < self.visitors_max
            self._coming += free
            return free

    def _take_over(self, ticket: str) -> dict[str, bytes] | None:
        """Take the place of who is here with a ticket, and what they know; None if nobody is.

        A socket that broke may look open from here for a while, and its owner is at the door.
        """
        with self._returning:  # who comes twice finds the second time what was kept the first time
            with self._lock:
                here = (one for one in self.visitors if one.ticket == ticket and one.can_be_kept)
                found = next(here, None)
                if found is None:
                    return None
                self.visitors.discard(found)
                self._coming += 1
            parts = self._let_go(found)
        found.end("this visit goes on in another window")
        return parts

    def _restore(self, visitor: Visitor, parts: dict[str, bytes]) -> None:
        try:
            visitor.restore(parts, self.vocabulary)
        except Exception:
            visitor.close()
            raise

    def begin(self, visitor: Visitor) -> None:
        """Make chunks for a visitor from now on."""
        for lane in self._lanes:
            lane.add(visitor)

    def leave(self, visitor: Visitor) -> None:
        """Let a visitor go and free all of it; waits for chunks that are being made."""
        self._let_go(visitor)

    def _let_go(self, visitor: Visitor) -> dict[str, bytes]:
        """Free a visitor, and return what is kept of the visit."""
        for lane in self._lanes:
            lane.remove(visitor)
        parts: dict[str, bytes] = {}
        try:
            if visitor.can_be_kept and not visitor.closed and not self._closing:
                parts = visitor.parts()
                self._put(visitor.ticket, parts)
        except Exception:
            log.exception("a visit could not be kept")
        visitor.close()
        with self._lock:
            self.visitors.discard(visitor)
        return parts

    def store(self, visitor: Visitor, ticket: str) -> None:
        """Keep a visit as it is now, under a ticket."""
        self._put(ticket, visitor.parts())

    def _put(self, ticket: str, parts: dict[str, bytes]) -> None:
        if parts:
            self.keep.put(ticket, parts)

    def wake(self) -> None:
        """Let the lanes look again who waits."""
        for lane in self._lanes:
            lane.wake()

    def _compile(self) -> None:
        try:
            for side in SIDES:
                if self._closing:
                    return
                self.world.compile(
                    side, lambda doing: self._tell(Status(self.status.ready, doing))
                )
                for visitor in tuple(self.visitors):
                    visitor.measure_anew(side)
                self._tell(Status((*self.status.ready, side)))
        except Exception as error:
            log.exception("a world did not compile")
            self.failure = LipassError(f"a world must compile, and {raised(error)}")
            self._tell(Status(self.status.ready, str(self.failure)))
            self.ended()

    def _tell(self, status: Status) -> None:
        self.status = status
        self.tell(status)


def _has_cores_for_both() -> bool:
    import torch

    return not torch.cuda.is_available() and _cores() >= len(SIDES)


def _cores() -> int:
    """Count the cores that this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
