"""Remember where in its cache each stream's latest chunks were written, and hold `held` to it.

The session is told which latents a cache holds, and in which order; a graph shows where it writes.
So what is told of the chunk before can be compared with where it went.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_SLOTS = (
    "pass as `held` the latents that the cache holds, in the order of its slots and without those "
    "that this chunk takes"
)


class Placed(NamedTuple):
    """Where the keys of one call lie in a cache, in latents.

    Attributes:
        capacity: of the cache.
        reads: first place of each piece of the history, and the one behind it, as it is read.
        written: first place of the call's own latents.
        moved: whether the call also moves what the cache holds.
    """

    capacity: int
    reads: tuple[tuple[int, int], ...]
    written: int
    moved: bool

    def places(self) -> list[int]:
        """List the places of the history, as it is read."""
        return [place for first, last in self.reads for place in range(first, last)]


class WrittenSlots:
    """Where the two latest chunks of each stream were written, for each size of a cache."""

    def __init__(self) -> None:
        self._written: dict[tuple[str, int], dict[int, tuple[int, int]]] = {}

    def add(self, stream: str, chunk: int, placed: Placed, latent: int) -> None:
        """Remember that a chunk's latents, from `latent` of the history on, were written."""
        known = self._written.setdefault((stream, placed.capacity), {})
        known[chunk] = (placed.written, latent)
        for old in [one for one in known if one < chunk - 1]:
            del known[old]

    def why_not(self, stream: str, chunk: int, placed: Placed, held: Sequence[int]) -> str:
        """Say how what a cache is said to hold differs from what was written, or nothing.

        Args:
            stream: of the chunk.
            chunk: its index.
            placed: where its keys lie.
            held: latents, one for each place that is read.
        """
        before = self._written.get((stream, placed.capacity), {}).get(chunk - 1)
        if before is None or placed.moved:
            return ""
        (place, latent), places = before, placed.places()
        if place not in places or held[places.index(place)] == latent:
            return ""
        at = places.index(place)
        return (
            f"held must follow the slots of the cache: latent {latent} was written to place {at} "
            f"of what is read, got {held[at]} there; {_SLOTS}"
        )

    def forget(self, stream: str) -> None:
        """Forget the slots of one stream."""
        self._written = {key: known for key, known in self._written.items() if key[0] != stream}

    def clear(self) -> None:
        """Forget all streams."""
        self._written.clear()

    def state(self) -> list[Any]:
        """Give what is remembered as plain data; `restore` takes it back."""
        return [
            [stream, capacity, [[chunk, *placed] for chunk, placed in known.items()]]
            for (stream, capacity), known in self._written.items()
        ]

    def restore(self, state: list[Any]) -> None:
        """Go on where a `state` was given."""
        self._written = {
            (stream, capacity): {chunk: (place, latent) for chunk, place, latent in known}
            for stream, capacity, known in state
        }


def why_unsaid(placed: Placed | None) -> str:
    """Say that a history need not lie in the order of time, and that nobody has said how it does.

    Args:
        placed: where it lies, if the graph shows it.
    """
    if placed is not None:
        places = placed.places()
        if places == sorted(places) and all(place < placed.written for place in places):
            return ""
    return (
        "a session must know which latent each place of a cache holds, got a cache that is not in "
        f"the order of time; {_SLOTS}"
    )
