"""A walk as a short text, for links: what was asked of each chunk, in order.

    8w,3wr,12,r~night,2y-14p3@context

Keys `w s a d` and `l r` (turn left, right), `y` and `p` degrees looked to the right and up; a
number in front repeats; `~word` is said and `@preset` chosen from that chunk on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from lipass.play.vocabulary import PRESET, WORD, Vocabulary
from lipass.play.world import Controls

# Half an hour at 4 chunks a second, if not one key is held for long.
LONGEST_WALK, LONGEST_TEXT = 7200, 127 * 1024
_TIMES = 9999
_BESIDE = len(f"{_TIMES},")
_ITEM = re.compile(
    r"(?P<times>[1-9]\d{0,3})?(?P<keys>[wsadlr]{0,3})(?:y(?P<yaw>-?\d{1,3}))?(?:p(?P<pitch>-?\d{1,3}))?"
    rf"(?P<words>(?:~{WORD})*)(?:@(?P<preset>{PRESET}))?"
)
_KEYS = {"w": (1, 0, 0), "s": (-1, 0, 0), "a": (0, -1, 0), "d": (0, 1, 0),
         "l": (0, 0, -1), "r": (0, 0, 1)}  # fmt: skip


class Stride(NamedTuple):
    """What was asked of one chunk; words and preset only where they changed."""

    controls: Controls
    words: tuple[str, ...] = ()
    preset: str = ""


def parse_walk(text: str, known: Vocabulary) -> tuple[Stride, ...]:
    """Read a walk; an empty text is none.

    Raises:
        ValueError: no walk, a longer one than `LONGEST_WALK` chunks, words and presets that the
            world does not have, or two words of one group in a chunk.
    """
    strides: list[Stride] = []
    for item in text.split(",") if text else ():
        found = _ITEM.fullmatch(item)
        if found is None or not item:
            raise ValueError(f"a walk has items like 8w or 2y-14p3, got {item!r:.40}")
        moves = [_KEYS[key] for key in found["keys"]]
        controls = Controls(
            *(max(-1, min(1, sum(axis))) for axis in zip(*moves, strict=True) if moves),
        )
        controls = controls._replace(yaw=int(found["yaw"] or 0), pitch=int(found["pitch"] or 0))
        words = tuple(filter(None, found["words"].split("~")))
        for word in words:
            if known.group_of(word) is None:
                raise ValueError(f"a walk says words of the world, got {word!r}")
        if len({known.group_of(word) for word in words}) < len(words):
            raise ValueError(f"a walk says one word of a group at once, got {item!r:.40}")
        preset = found["preset"] or ""
        if preset and preset not in known.presets:
            raise ValueError(f"a walk names presets of the world, got {preset!r}")
        times = int(found["times"] or 1)
        if len(strides) + times > LONGEST_WALK:
            raise ValueError(f"a walk must have at most {LONGEST_WALK} chunks, got more")
        strides.append(Stride(controls, words, preset))
        strides.extend([Stride(controls)] * (times - 1))
    return tuple(strides)


class Walked:
    """A walk that is being walked, as short as its text, to `LONGEST_WALK` or `LONGEST_TEXT`."""

    def __init__(self, strides: Iterable[Stride] = ()) -> None:
        self._items: list[tuple[int, str]] = []
        self._chunks = self._letters = 0
        self._full = False
        for stride in strides:
            self.add(stride)

    def add(self, stride: Stride) -> None:
        """Go on; from where it is too long for a link, it is left out."""
        text, times = _item(stride), 1
        letters = self._letters + len(text) + _BESIDE
        self._full |= self._chunks == LONGEST_WALK or letters > LONGEST_TEXT
        if self._full:
            return
        plain = not stride.words and not stride.preset
        if self._items and plain and self._items[-1][1] == text and self._items[-1][0] < _TIMES:
            times += self._items.pop()[0]
        else:
            self._letters = letters
        self._chunks += 1
        self._items.append((times, text))

    def __str__(self) -> str:
        return ",".join(f"{n if n > 1 or not text else ''}{text}" for n, text in self._items)


def format_walk(strides: Iterable[Stride]) -> str:
    """Write a walk; `parse_walk` reads it back."""
    return str(Walked(strides))


def _item(stride: Stride) -> str:
    ahead, aside, turn, yaw, pitch = stride.controls
    text = "".join(
        pair[value < 0] for pair, value in (("ws", ahead), ("da", aside), ("rl", turn)) if value
    )
    text += f"y{yaw}" if yaw else ""
    text += f"p{pitch}" if pitch else ""
    text += "".join(f"~{word}" for word in stride.words)
    return text + (f"@{stride.preset}" if stride.preset else "")
