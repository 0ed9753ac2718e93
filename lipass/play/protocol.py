"""What goes over the socket: few kinds of small messages, all checked, nothing of them executed.

From the browser comes JSON text, one object a message; `read` turns it into one of the classes
below or raises `Refused`. To the browser go JSON text and chunks of frames: the length of a JSON
header as 4 bytes, big endian, the header, then the pixels.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lipass.play.vocabulary import Vocabulary
from lipass.play.walk import LONGEST_TEXT, Stride, parse_walk
from lipass.play.world import Controls, Pixels, Words

# The longest walk, and what enters with it; anything else is some tens of bytes.
LONGEST_MESSAGE = LONGEST_TEXT + 1024
_LONGEST_PLAIN = 512
_LONGEST_TICKET = 64
_LOOK_MAX = 720  # degrees that one message can look on
_LARGEST_INPUT = 2**31


class Refused(ValueError):
    """A message that is not understood; says the rule, the value and what to send instead."""


@dataclass(frozen=True)
class Move:
    """Keys that are held, and degrees looked since the last one; `number` counts the inputs."""

    number: int
    controls: Controls


@dataclass(frozen=True)
class Say:
    """Words to say from now on: any of the world's, one a group."""

    number: int
    words: Words


@dataclass(frozen=True)
class Choose:
    """Preset of the fast side."""

    preset: str


@dataclass(frozen=True)
class Compare:
    """Whether the dense side runs too."""

    on: bool


@dataclass(frozen=True)
class Listen:
    """Whether audio comes: bytes, 16 bit samples at 16 kHz, little endian, of one channel."""

    on: bool


@dataclass(frozen=True)
class Film:
    """Begins a film of both pictures, or ends it and asks for a ticket to fetch it with."""

    on: bool


@dataclass(frozen=True)
class Recall:
    """Asks for the walk so far, for a link."""


@dataclass(frozen=True)
class Fork:
    """Asks for a ticket with which another visit goes on from here."""


@dataclass(frozen=True)
class Enter:
    """The first message: go to a room, perhaps along a recorded walk, or on from a ticket."""

    room: int | None
    walk: tuple[Stride, ...]
    token: str
    ticket: str = ""


Message = Move | Say | Choose | Compare | Listen | Film | Recall | Fork | Enter


def read(text: str | bytes | None, known: Vocabulary) -> Message:
    """Read one message of a browser.

    Raises:
        Refused: anything else.
    """
    if not isinstance(text, str):
        raise Refused("a message must be JSON text, got bytes; send one object")
    if len(text) > LONGEST_MESSAGE:
        raise Refused(f"a message must be short, got {len(text)} characters")
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Refused(f"a message must be JSON, got {text[:40]!r}") from None
    if not isinstance(data, dict):
        raise Refused(f"a message must be an object, got {text[:40]!r}")
    kind = data.pop("do", None)
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise Refused(f"do must be one of {', '.join(_READERS)}, got {kind!r:.40}")
    if kind != "enter" and len(text) > _LONGEST_PLAIN:
        raise Refused(f"{kind!r} must be shorter than {_LONGEST_PLAIN}, got {len(text)}")
    message = reader(data, known)
    if data:
        raise Refused(f"{kind!r} must have no other keys, got {', '.join(data)!r:.40}")
    return message


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _whole(data: dict[str, Any], key: str, low: int, high: int) -> int:
    value = data.pop(key, 0)
    if type(value) is not int or not low <= value <= high:
        raise Refused(f"{key} must be a whole number from {low} to {high}, got {value!r:.40}")
    return value


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise Refused(f"{name} must be one of {', '.join(allowed)}, got {value!r:.40}")
    return value


def _move(data: dict[str, Any], known: Vocabulary) -> Move:
    number = _whole(data, "number", 0, _LARGEST_INPUT)
    held = (_whole(data, key, -1, 1) for key in ("ahead", "aside", "turn"))
    looked = (_whole(data, key, -_LOOK_MAX, _LOOK_MAX) for key in ("yaw", "pitch"))
    return Move(number, Controls(*held, *looked))


def _say(data: dict[str, Any], known: Vocabulary) -> Say:
    number = _whole(data, "number", 0, _LARGEST_INPUT)
    words = data.pop("words", None)
    every = [word for group in known.words.values() for word in group]
    if not isinstance(words, list) or not 0 < len(words) <= len(known.words):
        raise Refused(f"words must be a list of 1 to {len(known.words)}, got {words!r:.40}")
    said = tuple(_one_of("a word", word, every) for word in words)
    groups = [known.group_of(word) for word in said]
    if len(set(groups)) != len(groups):
        raise Refused(f"words must be of different groups, got {', '.join(said)}")
    return Say(number, said)


def _choose(data: dict[str, Any], known: Vocabulary) -> Choose:
    return Choose(_one_of("preset", data.pop("preset", None), known.presets))


def _compare(data: dict[str, Any], known: Vocabulary) -> Compare:
    on = data.pop("on", None)
    if type(on) is not bool:
        raise Refused(f"on must be true or false, got {on!r:.40}")
    return Compare(on)


def _listen(data: dict[str, Any], known: Vocabulary) -> Listen:
    return Listen(_compare(data, known).on)


def _film(data: dict[str, Any], known: Vocabulary) -> Film:
    return Film(_compare(data, known).on)


def _recall(data: dict[str, Any], known: Vocabulary) -> Recall:
    return Recall()


def _fork(data: dict[str, Any], known: Vocabulary) -> Fork:
    return Fork()


def _enter(data: dict[str, Any], known: Vocabulary) -> Enter:
    room = _whole(data, "room", 0, known.rooms - 1) if "room" in data else None
    token, walk, ticket = (data.pop(name, "") for name in ("token", "walk", "ticket"))
    if not all(isinstance(one, str) for one in (token, walk, ticket)):
        raise Refused("token, walk and ticket must be text")
    if len(ticket) > _LONGEST_TICKET:
        raise Refused(f"a ticket must be short, got {len(ticket)} characters")
    try:
        strides = parse_walk(walk, known)
    except ValueError as error:
        raise Refused(str(error)) from None
    return Enter(room, strides, token, ticket)


_READERS: dict[str, Callable[[dict[str, Any], Vocabulary], Message]] = {
    "move": _move,
    "say": _say,
    "choose": _choose,
    "compare": _compare,
    "listen": _listen,
    "film": _film,
    "walk": _recall,
    "fork": _fork,
    "enter": _enter,
}


def pack(header: Mapping[str, Any], frames: Pixels) -> bytes:
    """Put a chunk `[n, rows, columns, 3]` behind its header."""
    told = json.dumps(
        {**header, "shape": frames.shape[:3]}, allow_nan=False, separators=(",", ":")
    ).encode()
    return struct.pack(">I", len(told)) + told + frames.tobytes()


def unpack(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Return header and pixels of a chunk, as a client in Python wants them."""
    (length,) = struct.unpack_from(">I", data)
    return json.loads(data[4 : 4 + length]), memoryview(data)[4 + length :]
