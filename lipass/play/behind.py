"""What the dense side has to make of what the fast side has shown, and how far they differ."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from lipass.play.figures import distance_db
from lipass.play.header import Stretch
from lipass.play.settling import Settling
from lipass.play.world import Pixels, Words

# Chunks of the fast side that wait to be compared with the dense one.
_COMPARED = 16


class Behind:
    """Which stretch is next: the newest, and where that is made, again while words change.

    Args:
        words: of the view of the entrance.

    Attributes:
        done: chunk that was made last.
        missed: chunks that were never made.
    """

    def __init__(self, words: Words) -> None:
        self.done, self.missed = -1, 0
        self._newest: Stretch | None = None
        self._settling = Settling(words)
        self._to_compare: OrderedDict[int, Pixels] = OrderedDict()
        self._lock = threading.Lock()

    def show(self, stretch: Stretch, frames: Pixels) -> None:
        """Learn what the fast side has made."""
        with self._lock:
            self._to_compare[stretch.chunk] = frames
            while len(self._to_compare) > _COMPARED:
                self._to_compare.popitem(last=False)
            self._newest = stretch

    def waits(self, rests_at: int | None) -> bool:
        """Whether a chunk is to be made.

        Args:
            rests_at: the latest chunk of the fast side where it makes no other one.
        """
        newest = self._newest
        if newest is None:
            return False
        return newest.chunk > self.done or (newest.chunk == rests_at and self._settling.left > 0)

    def lags(self, chunk: int) -> bool:
        """Whether something is to be made yet once the fast side has shown a chunk."""
        return 0 <= self.done < chunk or self._settling.left > 0

    def take(self) -> Stretch:
        """Take the stretch that is next."""
        stretch = self._newest
        assert stretch is not None
        self.missed += max(stretch.chunk - self.done - 1, 0)
        self.done = stretch.chunk
        self._settling.take(stretch.words)
        return stretch

    def distance_db(self, stretch: Stretch, frames: Pixels) -> float | None:
        """Compare a chunk with that of the fast side, if it is there still."""
        with self._lock:
            other = self._to_compare.get(stretch.chunk)
            for chunk in [one for one in self._to_compare if one < stretch.chunk]:
                del self._to_compare[chunk]
        return None if other is None else round(distance_db(frames, other), 2)

    def forget(self) -> None:
        """Drop what waits to be compared."""
        self._to_compare.clear()

    def state(self) -> dict[str, Any]:
        """Give what holds on, as plain data."""
        settling = self._settling
        return {
            "done": self.done,
            "missed": self.missed,
            "words": list(settling.words),
            "settling": settling.left,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a `state` was given."""
        self.done, self.missed = state["done"], state["missed"]
        self._settling.words, self._settling.left = tuple(state["words"]), state["settling"]
