"""One visitor: what is asked for, where both sides are, and what they have to make next.

The fast side takes what is asked when a chunk begins, and never waits for the other. The dense
side gets the same cameras; where it is slower it takes the newest stretch and misses those
between, which is counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from lipass.play.asked import Asked
from lipass.play.figures import Rate, distance_db
from lipass.play.protocol import Choose, Compare, Move, Say
from lipass.play.walk import Stride
from lipass.play.world import (
    DENSE,
    FAST,
    SIDES,
    Camera,
    Made,
    Pixels,
    Side,
    Visit,
    Words,
    World,
)

log = logging.getLogger(__name__)

# Chunks of the fast side that wait to be compared with the dense one.
_COMPARED = 16


class Out(Protocol):
    """Where chunks of a visitor go."""

    def full(self) -> bool:
        """Whether the visitor reads too slowly for one more."""

    def chunk(self, header: dict[str, Any], frames: Pixels) -> None:
        """Send a chunk; called by lanes."""

    def failed(self, why: str) -> None:
        """The visit cannot go on; called by lanes."""


class _Stretch(NamedTuple):
    """What both sides show of one chunk."""

    chunk: int
    way: Any
    camera: Camera
    words: Words
    preset: str
    number: int
    """The latest input that it follows."""
    seconds: float
    """What finding the way took: a part of the chunk of either side, done once for both."""


class Visitor:
    """A visitor and both sides.

    Args:
        world: what is served.
        room: where the visit is.
        visit: the way through it.
        walk: what is replayed before keys are followed.
        out: where chunks go.
        wake: tells the lanes that something is asked for.
    """

    def __init__(
        self,
        world: World,
        room: int,
        visit: Visit,
        walk: Iterable[Stride],
        out: Out,
        wake: Callable[[], None],
    ) -> None:
        self.room = room
        self.plan, self.first, self.camera = visit.plan, visit.first, visit.camera
        self._world, self._visit, self._out, self._wake = world, visit, out, wake
        self._sides: dict[str, Side] = {name: visit.side(name) for name in SIDES}
        self._rates = {name: Rate(world.chunk_frames) for name in SIDES}
        self._lock = threading.Lock()
        self._making = {name: threading.Lock() for name in SIDES}
        self._asked = Asked(world, walk)
        self._compare = True
        self._next_at = 0.0
        self._chunks = 0
        self._newest: _Stretch | None = None
        self._dense_done = -1
        self._missed = 0
        self._to_compare: OrderedDict[int, Pixels] = OrderedDict()
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

    def choose(self, message: Choose) -> None:
        """Give the fast side another preset."""
        self._asked.choose(message)
        self._wake()

    def compare(self, message: Compare) -> None:
        """Let the dense side run, or not."""
        with self._lock:
            self._compare = message.on
        self._wake()

    def walked(self) -> str:
        """Return the walk so far as text, from the entrance on."""
        return self._asked.walked()

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
        newest = self._newest
        waits = self._compare and newest is not None and newest.chunk > self._dense_done
        return 0.0 if waits else None

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

    def close(self) -> None:
        """Free both sides, behind the chunks that are being made."""
        self.closed = True
        for name in SIDES:
            with self._making[name]:
                self._sides[name].close()
        self._to_compare.clear()
        self._asked.forget()

    def _make_fast(self) -> None:
        start = time.monotonic()
        self._next_at = start + self._world.chunk_frames / self._world.fps
        number, stride = self._asked.number, self._asked.take()
        begin = time.perf_counter()
        way = self._visit.go(stride.controls)
        stretch = _Stretch(
            self._chunks, way, self._visit.camera, self._asked.words, self._asked.preset, number,
            time.perf_counter() - begin,
        )  # fmt: skip
        self._chunks += 1
        made, seconds = self._timed(FAST, stretch)
        self._out.chunk(self._header(FAST, stretch, made, seconds), made.frames)
        with self._lock:
            self._to_compare[stretch.chunk] = made.frames
            while len(self._to_compare) > _COMPARED:
                self._to_compare.popitem(last=False)
            self._newest = stretch
        self._wake()

    def _make_dense(self) -> None:
        stretch = self._newest
        assert stretch is not None
        self._missed += stretch.chunk - self._dense_done - 1
        self._dense_done = stretch.chunk
        made, seconds = self._timed(DENSE, stretch)
        with self._lock:
            other = self._to_compare.get(stretch.chunk)
            for chunk in [one for one in self._to_compare if one <= stretch.chunk]:
                del self._to_compare[chunk]
        header = self._header(DENSE, stretch, made, seconds)
        header["db"] = None if other is None else round(distance_db(made.frames, other), 2)
        header["behind"] = self._chunks - 1 - stretch.chunk
        header["missed"] = self._missed
        self._out.chunk(header, made.frames)

    def _timed(self, side: str, stretch: _Stretch) -> tuple[Made, float]:
        begin = time.perf_counter()
        made = self._sides[side].make(stretch.chunk, stretch.way, stretch.words, stretch.preset)
        seconds = time.perf_counter() - begin + stretch.seconds
        self._rates[side].add(seconds)
        return made, seconds

    def _header(self, side: str, stretch: _Stretch, made: Made, seconds: float) -> dict[str, Any]:
        rate, still = self._rates[side], not self._asked.moves
        return {
            "do": "chunk",
            "side": side,
            "chunk": stretch.chunk,
            "number": stretch.number,
            "seconds": round(seconds, 4),
            "own_fps": _rounded(rate.own_fps),
            "shown_fps": _rounded(rate.shown_fps(still)),
            "camera": _place(stretch.camera),
            "words": stretch.words,
            "preset": stretch.preset,
            "replays": self._asked.replays,
            "memory": [[*_place(one.camera), one.kind[0]] for one in made.memory],
            "read": made.read,
            "steps": [made.steps, made.steps_total],
            "density": round(made.density, 3),
            "why": made.why,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _place(camera: Camera) -> tuple[float, float, int]:
    return round(camera.x, 2), round(camera.z, 2), round(camera.yaw)
