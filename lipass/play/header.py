"""What is told of a chunk beside its frames."""

from __future__ import annotations

from typing import Any, NamedTuple

from lipass.play.figures import Rate
from lipass.play.world import Camera, Made, Words


class Stretch(NamedTuple):
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


def header_of(
    side: str,
    stretch: Stretch,
    made: Made,
    seconds: float,
    rate: Rate,
    still: bool,
    replays: int,
) -> dict[str, Any]:
    """Tell of one chunk.

    Args:
        side: whose it is.
        stretch: what it shows.
        made: the chunk.
        seconds: that it took.
        rate: of the side.
        still: whether nothing more is asked for.
        replays: chunks of a recorded walk that are left.
    """
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
        "replays": replays,
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
