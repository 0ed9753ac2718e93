"""Count the chunks in which a change of words shows, on one side."""

from __future__ import annotations

from lipass.play.world import Words

# Chunks in which a new word shows; then a still view stays as it is and costs nothing.
_CHUNKS_AFTER_WORDS = 4


class Settling:
    """A change of words: either side has its own, and makes the chunks that it takes.

    Args:
        words: of the view of the entrance.

    Attributes:
        left: chunks until the change has come to its end.
    """

    def __init__(self, words: Words) -> None:
        self.words, self.left = words, 0

    def take(self, words: Words) -> None:
        """Go on with the next chunk of the side, and its words."""
        if words != self.words:
            self.words, self.left = words, _CHUNKS_AFTER_WORDS
        self.left = max(self.left - 1, 0)
