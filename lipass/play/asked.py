"""What a visitor asks for: held keys, looks, words and a preset, taken chunk by chunk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

from lipass.play.protocol import Choose, Move, Say
from lipass.play.settling import Settling
from lipass.play.vocabulary import Vocabulary
from lipass.play.walk import Stride, Walked, format_walk, parse_walk
from lipass.play.world import STILL, Controls, Words, World

# Chunks' worth of looking that is kept while a pointer is faster than the camera.
_LOOK_AHEAD = 2


class Asked:
    """What is asked for and not taken yet; any thread may call it.

    Args:
        world: for its words and presets, and how far a chunk can turn.
        walk: what is replayed before keys are followed.

    Attributes:
        number: the latest input.
        words: what is said, one word a group.
        preset: of the fast side.
    """

    def __init__(self, world: World, walk: Iterable[Stride]) -> None:
        self.number = 0
        self._groups, self._look = list(world.words.values()), world.look
        self.words: Words = tuple(group[0] for group in self._groups)
        self.preset = world.presets[0]
        self._held = self._tapped = STILL
        self._said: dict[int, str] = {}
        self._chosen = ""
        self._replay = deque(walk)
        self._walked = Walked()
        self._unasked = True  # whether a chunk is due without keys: the view of the entrance
        self._settling = Settling(self.words)
        self._lock = threading.Lock()

    def move(self, message: Move) -> None:
        """Hold other keys, and look on by some degrees."""
        with self._lock:
            given, before = message.controls, self._held
            most = _LOOK_AHEAD * self._look
            yaw = _within(before.yaw + given.yaw, most)
            pitch = _within(before.pitch + given.pitch, most)
            self._held = given._replace(yaw=yaw, pitch=pitch)
            # A key that is let go before a chunk begins moves that chunk all the same.
            self._tapped = _either(given, self._tapped)
            self.number = message.number
            if self._held != STILL:
                self._replay.clear()  # who takes the keys walks on alone

    def say(self, message: Say) -> None:
        """Say words from the next chunk on."""
        with self._lock:
            for word in message.words:
                self._said[next(i for i, group in enumerate(self._groups) if word in group)] = word
            self.number = message.number
            self._unasked = True

    def choose(self, message: Choose) -> None:
        """Choose another preset from the next chunk on."""
        with self._lock:
            self._chosen = message.preset
            self._unasked = True

    def show(self) -> None:
        """Ask for a chunk though nothing else is asked for."""
        self._unasked = True

    @property
    def replays(self) -> int:
        """Chunks of a recorded walk that are left."""
        return len(self._replay)

    @property
    def moves(self) -> bool:
        """Whether the camera is to move."""
        return bool(self._replay) or self._held != STILL or self._tapped != STILL

    @property
    def waits(self) -> bool:
        """Whether a chunk is asked for."""
        return self.moves or self._unasked or self._settling.left > 0

    def take(self) -> Stride:
        """Take what is asked of the next chunk."""
        with self._lock:
            self._unasked = False
            if self._replay:
                stride = self._replay.popleft()
            else:
                held = self._held
                yaw, pitch = _within(held.yaw, self._look), _within(held.pitch, self._look)
                controls = _either(held, self._tapped)._replace(yaw=yaw, pitch=pitch)
                stride = Stride(controls, tuple(self._said.values()), self._chosen)
                self._held = held._replace(yaw=held.yaw - yaw, pitch=held.pitch - pitch)
                self._said, self._chosen, self._tapped = {}, "", STILL
            self.preset = stride.preset or self.preset
            self.words = tuple(
                next((word for word in stride.words if word in group), before)
                for group, before in zip(self._groups, self.words, strict=True)
            )
            self._settling.take(self.words)
            self._walked.add(stride)
            return stride

    def walked(self) -> str:
        """Return the walk so far as text, from the entrance on."""
        with self._lock:
            return str(self._walked)

    def state(self) -> dict[str, Any]:
        """Give what holds on as plain data: words, preset and walks; no keys, they are let go."""
        with self._lock:
            return {
                "words": list(self.words),
                "preset": self.preset,
                "settling": self._settling.left,
                "walked": str(self._walked),
                "replay": format_walk(self._replay),
            }

    def restore(self, state: dict[str, Any], known: Vocabulary) -> None:
        """Go on where a `state` was given: with a change of words that had not come to its end.

        Raises:
            ValueError: words or presets of another world.
        """
        with self._lock:
            self.words, self.preset = tuple(state["words"]), state["preset"]
            self._walked = Walked(parse_walk(state["walked"], known))
            self._replay = deque(parse_walk(state["replay"], known))
            self._settling.words, self._settling.left = self.words, state["settling"]
            self._unasked = False

    def forget(self) -> None:
        """Drop what is left of a recorded walk."""
        self._replay.clear()


def _either(now: Controls, before: Controls) -> Controls:
    """Keep keys of before where none of their axis is held now; looks are left out."""
    return Controls(*(a or b for a, b in zip(now[:3], before[:3], strict=True)))


def _within(value: int, most: int) -> int:
    return max(-most, min(most, value))
