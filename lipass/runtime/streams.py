"""Keep the streams of a session apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from lipass.runtime.scope import Block, enter, leave
from lipass.runtime.turns import Turns, check_stream

if TYPE_CHECKING:
    from lipass.runtime.chunk import Chunk
    from lipass.session import Session


class Streamed:
    """What a `Session` can do with its streams."""

    turns: Turns

    @property
    def open_chunks(self) -> dict[str, Chunk]:
        """The open chunk of each stream."""
        return self.turns.open

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Keep the stored outputs of the model calls inside apart, e.g. those of a CFG branch.

        Branches share the chunk and its plan. Without this, calls of a step are told apart by
        what differs in their inputs, latents and noise level aside.
        """
        check_stream(name)
        branch = Block(cast("Session", self), branch=name)
        enter(branch, depth=2)
        try:
            yield
        finally:
            leave(branch)
