"""One visitor: what is asked for, where both sides are, and what they have to make next.

The fast side takes what is asked when a chunk begins, and never waits for the other. The dense
side gets the same cameras; where it is slower it takes the newest stretch and misses those
between, which is counted. A change of words is each side's own: either makes all chunks of it.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast

import numpy as np
import torch

from lipass.play.asked import Asked
from lipass.play.behind import Behind
from lipass.play.figures import Rate
from lipass.play.film import Film
from lipass.play.header import Stretch, header_of
from lipass.play.keep import Keeping
from lipass.play.protocol import Choose, Compare, Move, Say
from lipass.play.vocabulary import Vocabulary
from lipass.play.walk import Stride
from lipass.play.world import (
    DENSE,
    FAST,
    SIDES,
    Made,
    Pixels,
    Resumable,
    Side,
    Visit,
    Words,
    World,
)
from lipass.runtime.tree_file import checked, from_bytes, to_bytes

log = logging.getLogger(__name__)

_KIND, _VERSION = "lipass.visit", 2


class Out(Protocol):
    """Where chunks of a visitor go."""

    def full(self) -> bool:
        """Whether the visitor reads too slowly for one more."""

    def chunk(self, header: dict[str, Any], frames: Pixels) -> None:
        """Send a chunk; called by lanes."""

    def failed(self, why: str) -> None:
        """The visit cannot go on; called by lanes."""


class Visitor:
    """A visitor and both sides.

    Args:
        world: what is served.
        room: where the visit is.
        visit: the way through it.
        walk: what is replayed before keys are followed.
        out: where chunks go.
        wake: tells the lanes that something is asked for.
        keep: gets what has changed behind each chunk, if it is to be kept at once.

    Attributes:
        ticket: with which the visit is kept.
        can_be_kept: whether the world says how its visits go on.
        film: that is being made of it.
    """

    def __init__(
        self,
        world: World,
        room: int,
        visit: Visit,
        walk: Iterable[Stride],
        out: Out,
        wake: Callable[[], None],
        keep: Keeping | None = None,
    ) -> None:
        self.room, self.ticket = room, secrets.token_urlsafe(16)
        self._keep = keep
        self.plan, self.first, self.camera = visit.plan, visit.first, visit.camera
        self._world, self._visit, self._out, self._wake = world, visit, out, wake
        self._sides: dict[str, Side] = {name: visit.side(name) for name in SIDES}
        self.can_be_kept = all(isinstance(o, Resumable) for o in (visit, *self._sides.values()))
        self._rates = {name: Rate(world.chunk_frames) for name in SIDES}
        self._making = {name: threading.Lock() for name in SIDES}
        self._asked = Asked(world, walk)
        self._compare = True
        self._next_at = 0.0
        self._chunks = 0
        self._behind = Behind(self._asked.words)
        self._shown = visit.first
        self._beside = visit.first[None]
        self.film: Film | None = None
        self.closed = False

    # What is asked for: called by the socket.

    def move(self, message: Move) -> None:
        """Hold other keys, and look on."""
        self._asked.move(message)
        self._wake()

    def say(self, message: Say) -> None:
        """Say words from the next chunk on."""
        self._asked.say(message)
        self._wake()

    def hear(self, words: Words) -> None:
        """Say words that were spoken."""
        self.say(Say(self._asked.number, words))

    def choose(self, message: Choose) -> None:
        """Give the fast side another preset."""
        self._asked.choose(message)
        self._wake()

    def compare(self, message: Compare) -> None:
        """Let the dense side run, or not."""
        self._compare = message.on
        self._wake()

    def walked(self) -> str:
        """Return the walk so far as text, from the entrance on."""
        return self._asked.walked()

    @property
    def said(self) -> tuple[Words, str]:
        """Words and preset of the latest chunk."""
        return self._asked.words, self._asked.preset

    def parts(self) -> dict[str, bytes]:
        """Give all that goes on, behind the chunks that are being made."""
        found = {}
        for side in SIDES:
            with self._making[side]:
                if not self.closed:
                    found[side] = self._part(side)
        return found

    def _part(self, side: str) -> bytes:
        """Write what one side's lane changes."""
        part: Any = self._sides[side]
        tree: dict[str, Any] = {"room": self.room, "side": part.state()}
        if side == FAST:
            visit: Any = self._visit
            tree |= {
                "visit": visit.state(),
                "asked": self._asked.state(),
                "chunks": self._chunks,
                "shown": torch.from_numpy(np.ascontiguousarray(self._shown)),
            }
        else:
            tree["behind"] = self._behind.state()
        return to_bytes(checked(tree, "a visit"), _KIND, _VERSION)

    def restore(self, parts: Mapping[str, bytes], known: Vocabulary) -> None:
        """Go on where another visitor of the same room was, at the latest chunk of each side.

        Raises:
            ValueError: parts of another world or version.
        """
        fast = from_bytes(parts[FAST], _KIND, _VERSION)
        visit, side = cast(Any, self._visit), cast(Any, self._sides[FAST])
        visit.restore(fast["visit"])
        side.restore(fast["side"])
        self._asked.restore(fast["asked"], known)
        self._chunks = fast["chunks"]
        self._shown = self.first = fast["shown"].numpy()
        self.camera = self._visit.camera
        if DENSE in parts:
            dense = from_bytes(parts[DENSE], _KIND, _VERSION)
            cast(Any, self._sides[DENSE]).restore(dense["side"])
            self._behind.restore(dense["behind"])
            if self._behind.lags(self._chunks - 1):  # it catches up by what the fast side shows
                self._asked.show()

    def end(self, why: str) -> None:
        """Tell the visitor that the visit is over here."""
        self._out.failed(why)

    def measure_anew(self, side: str) -> None:
        """Forget how fast a side was: it is compiled from now on."""
        self._rates[side] = Rate(self._world.chunk_frames)

    # What is made: called by lanes.

    def due(self, side: str) -> float | None:
        """Return since when a chunk of a side waits; None if none does."""
        if self.closed or self._out.full():
            return None
        if side == FAST:
            return self._next_at if self._asked.waits else None
        rests_at = None if self._asked.waits else self._chunks - 1
        return 0.0 if self._compare and self._behind.waits(rests_at) else None

    def make(self, side: str) -> None:
        """Make one chunk of a side and send it; what fails ends this visit alone."""
        with self._making[side]:
            if self.closed:
                return
            try:
                if side == FAST:
                    self._make_fast()
                else:
                    self._make_dense()
            except Exception as error:
                log.exception("a visit ended")
                self.closed = True
                self._out.failed(f"{type(error).__name__} in the {side} side")
                return
            if self._keep is not None and self.can_be_kept:
                try:
                    self._keep.put(self.ticket, {side: self._part(side)})
                except Exception:  # who keeps it may be away: the visit goes on here
                    log.exception("a chunk could not be kept")

    def close(self) -> None:
        """Free both sides, once, behind the chunks that are being made."""
        self.closed = True
        for name in SIDES:
            with self._making[name]:
                if (side := self._sides.pop(name, None)) is not None:
                    side.close()
        self._behind.forget()
        self._asked.forget()

    def _make_fast(self) -> None:
        start = time.monotonic()
        self._next_at = start + self._world.chunk_frames / self._world.fps
        chunk = self._chunks
        self._chunks += 1  # before it is taken: the dense side sees that another one comes
        number, stride = self._asked.number, self._asked.take()
        begin = time.perf_counter()
        way = self._visit.go(stride.controls)
        stretch = Stretch(
            chunk, way, self._visit.camera, self._asked.words, self._asked.preset, number,
            time.perf_counter() - begin,
        )  # fmt: skip
        made, seconds = self._timed(FAST, stretch)
        self._shown = made.frames[-1]
        if (film := self.film) is not None:
            film.add(made.frames, self._beside)
        self._out.chunk(self._told(FAST, stretch, made, seconds), made.frames)
        self._behind.show(stretch, made.frames)
        self._wake()

    def _make_dense(self) -> None:
        stretch = self._behind.take()
        made, seconds = self._timed(DENSE, stretch)
        self._beside = made.frames
        header = self._told(DENSE, stretch, made, seconds)
        header["db"] = self._behind.distance_db(stretch, made.frames)
        header["behind"] = self._chunks - 1 - stretch.chunk
        header["missed"] = self._behind.missed
        self._out.chunk(header, made.frames)

    def _told(self, side: str, stretch: Stretch, made: Made, seconds: float) -> dict[str, Any]:
        still, replays = not self._asked.moves, self._asked.replays
        return header_of(side, stretch, made, seconds, self._rates[side], still, replays)

    def _timed(self, side: str, stretch: Stretch) -> tuple[Made, float]:
        begin = time.perf_counter()
        made = self._sides[side].make(stretch.chunk, stretch.way, stretch.words, stretch.preset)
        seconds = time.perf_counter() - begin + stretch.seconds
        self._rates[side].add(seconds)
        return made, seconds


def room_of(part: bytes) -> int:
    """Return the room of a visit that was kept."""
    room: int = from_bytes(part, _KIND, _VERSION)["room"]
    return room
