"""Hold chunks to their turns: one at a time in a stream, each once, and none goes back."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from lipass.errors import LipassError

if TYPE_CHECKING:
    from lipass.runtime.chunk import Chunk

_LEAVE = (
    "leave the `with` block of the first (chunk.close() where it was entered without one), or "
    "name another stream"
)


class Turns:
    """Which chunks of each stream are open and done.

    Attributes:
        open: the open chunk of each stream.
    """

    def __init__(self) -> None:
        self.open: dict[str, Chunk] = {}
        self.closed = False
        self._done: dict[str, int] = {}
        self._history: dict[str, int] = {}

    def next(self, stream: object) -> int:
        """Return how many chunks a stream has had.

        Raises:
            TypeError: a stream that is no name.
            ValueError: an empty name.
            LipassError: the session is closed, or the stream has an open chunk.
        """
        check_stream(stream)
        assert isinstance(stream, str)
        if self.closed:
            raise LipassError("a chunk needs an open session, got a closed one; make a new one")
        if stream in self.open:
            raise LipassError(
                f"a stream has one chunk at a time, got a second for {stream!r}; {_LEAVE}"
            )
        return self._done.get(stream, 0)

    def fresh(self) -> str:
        """Name a stream that has had no chunk and has none open: main, main-2, main-3, ..."""
        names = itertools.chain(["main"], (f"main-{n}" for n in itertools.count(2)))
        return next(name for name in names if name not in self.open and name not in self._done)

    def upcoming(self, stream: object) -> int:
        """Return the index of the chunk that is made next, behind one that is open.

        Raises:
            TypeError: a stream that is no name.
            ValueError: an empty name.
            LipassError: the session is closed.
        """
        check_stream(stream)
        assert isinstance(stream, str)
        if self.closed:
            raise LipassError("a prompt needs an open session, got a closed one; make a new one")
        return self._done.get(stream, 0) + (stream in self.open)

    def check_history(self, stream: str, latents: int) -> None:
        """Refuse a history that has become shorter, of which indices would mean other latents.

        Raises:
            ValueError: fewer latents than the chunk before had.
        """
        before = self._history.get(stream, 0)
        if latents < before:
            raise ValueError(
                f"the history of a stream must not become shorter, got {latents} latents after "
                f"{before}; pass all of them, and as `held` those that the model still has; to "
                "begin anew or go back, name another stream or open another session"
            )

    def begin(self, chunk: Chunk) -> None:
        """Open a chunk.

        Raises:
            LipassError: it is not its turn.
        """
        stream = chunk.plan.stream
        turn = self.next(stream)
        if chunk.plan.index != turn:
            raise LipassError(
                f"a chunk is made when its turn comes, got chunk {chunk.plan.index} of "
                f"{stream!r}, which has had {turn}; make it with session.chunk(...) behind the "
                "one before"
            )
        self.open[stream] = chunk

    def leave(self, chunk: Chunk) -> bool:
        """Close a chunk; False where something else has closed it."""
        if self.open.get(chunk.plan.stream) is not chunk:
            return False
        del self.open[chunk.plan.stream]
        return True

    def finish(self, chunk: Chunk) -> None:
        """Count a chunk that was generated to its end."""
        stream = chunk.plan.stream
        self._done[stream] = chunk.plan.index + 1
        self._history[stream] = chunk.plan.history_latents

    def state(self) -> dict[str, Any]:
        """Give what streams have had as plain data; `restore` takes it back."""
        return {"done": dict(self._done), "history": dict(self._history)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a `state` was given."""
        self._done, self._history = dict(state["done"]), dict(state["history"])

    def forget(self, stream: object) -> None:
        """Forget a stream, which then has had no chunk.

        Raises:
            TypeError: a stream that is no name.
            ValueError: an empty name.
            LipassError: it has an open chunk.
        """
        check_stream(stream)
        assert isinstance(stream, str)
        if stream in self.open:
            raise LipassError(
                f"a stream is forgotten between two chunks, got an open one, "
                f"{self.open[stream].index} of {stream!r}; leave its `with` block first "
                "(chunk.close() where it was entered without one)"
            )
        self._done.pop(stream, None)
        self._history.pop(stream, None)

    def clear(self) -> None:
        """Forget all streams."""
        self.open.clear()
        self._done.clear()
        self._history.clear()


def check_stream(name: object) -> None:
    """Refuse what cannot name a stream.

    Raises:
        TypeError: no string.
        ValueError: an empty one, which stands for no stream.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"a stream must have a name, got {name!r} of kind {type(name).__name__}; pass a "
            "string, such as the number of the request as text"
        )
    if not name:
        raise ValueError("a stream must have a name, got ''; leave it out for 'main'")
