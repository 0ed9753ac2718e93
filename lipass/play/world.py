"""What `lipass play` serves: a model and its places, behind four small interfaces.

A user's own world is a callable without arguments that returns a `World`: `lipass play
file.py:callable`. `lipass/examples` has one to be read.

    World   the compiled model, both ways; made once
    Visit   one visitor's way through a place; both sides follow it
    Side    what one of the two has generated for a visitor; holds its `lipass.Session`
    Made    one chunk

Visits go on after a socket broke, or twice, where visits and sides also have the two methods of
`Resumable`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

# The side that runs ahead, and the one it is compared with.
FAST, DENSE = "fast", "dense"
SIDES = (FAST, DENSE)

Words = tuple[str, ...]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Controls(NamedTuple):
    """What a visitor asks of one chunk: whole numbers, so that a walk is a short text.

    Attributes:
        ahead: -1, 0 or 1; walks back or ahead.
        aside: -1, 0 or 1; left or right.
        turn: -1, 0 or 1; turns left or right.
        yaw: degrees to look to the right, over the whole chunk.
        pitch: degrees to look up.
    """

    ahead: int = 0
    aside: int = 0
    turn: int = 0
    yaw: int = 0
    pitch: int = 0


STILL = Controls()


class Camera(NamedTuple):
    """Where somebody stands on the map, in metres, and looks, in degrees right of +z."""

    x: float
    z: float
    yaw: float


class Remembered(NamedTuple):
    """One frame of a side's history, and what became of it in a chunk.

    Attributes:
        camera: where it was seen from.
        kind: "window", "memory", "sink", "kept" or "dropped".
    """

    camera: Camera
    kind: str


@dataclass(frozen=True)
class Made:
    """One generated chunk.

    Attributes:
        frames: `[n, rows, columns, 3]` uint8.
        memory: the history that was there, oldest first.
        steps: denoising steps that were computed.
        steps_total: those of the sampler.
        density: share of the attention blocks that were visited.
        why: one line on the choice of steps, such as "revisits latent 12, score 0.81".
    """

    frames: Pixels
    memory: Sequence[Remembered] = field(default=(), repr=False)
    steps: int = 0
    steps_total: int = 0
    density: float = 1.0
    why: str = ""

    @property
    def read(self) -> int:
        """Frames of the history that the model read."""
        return sum(one.kind != "dropped" for one in self.memory)


class Side(Protocol):
    """One of the two rollouts of a visitor; called by one thread at a time."""

    def make(self, chunk: int, stretch: Any, words: Words, preset: str) -> Made:
        """Generate the frames of one stretch of the way.

        Args:
            chunk: its number; a side may have missed some, and while words change, it is asked for
                its latest one again where the visitor stands still.
            stretch: what `Visit.go` returned.
            words: one of each group of `World.words`.
            preset: one of `World.presets`; means nothing to the dense side.
        """

    def close(self) -> None:
        """Free all of it; the visitor has left."""


class Visit(Protocol):
    """One visitor's way through a place.

    Attributes:
        camera: where the visitor stands.
        plan: the place from above, in metres: `{"size": [width, depth], "boxes": [[x0, z0, x1,
            z1], ...]}`; empty without a map.
        first: the frame that is seen before any is generated.
    """

    camera: Camera
    plan: Mapping[str, Any]
    first: Pixels

    def go(self, controls: Controls) -> Any:
        """Move, and return what both sides need to show it: the cameras of the next chunk."""

    def side(self, name: str) -> Side:
        """Begin one of `SIDES`."""


@runtime_checkable
class Resumable(Protocol):
    """What a visit and its sides have where they can be stopped between two chunks and go on."""

    def state(self) -> Any:
        """Give all that was walked or generated: plain data and tensors, no objects."""

    def restore(self, state: Any) -> None:
        """Go on where a `state` was given; called on a new one of the same room and side."""


class World(Protocol):
    """A model, compiled both ways, and the places it shows.

    Attributes:
        title: of the page.
        chunk_frames: frames of a chunk.
        size: rows and columns of a frame.
        fps: frames a second at which its motion has natural speed.
        look: degrees that a camera can turn within a chunk, a whole number.
        words: groups of words, one of each is said; the first of a group is the default. Letters
            a-z, digits and hyphens, as links to walks hold them; no word is in two groups.
        presets: that a visitor may switch the fast side to, without a new compilation; named of
            the same signs.
        room: the place that a visitor enters who names none.
        rooms: how many places there are, numbered from 0.
    """

    title: str
    chunk_frames: int
    size: tuple[int, int]
    fps: float
    look: int
    words: Mapping[str, Sequence[str]]
    presets: Sequence[str]
    room: int
    rooms: int

    def compile(self, side: str, say: Callable[[str], None]) -> None:
        """Compile one of `SIDES`, and `say` what is being compiled.

        A thread of its own calls it, once a side. Chunks are made meanwhile, uncompiled.
        """

    def visit(self, room: int) -> Visit:
        """Let somebody in."""
