"""Keep the streams of a session apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from lipass.runtime.scope import Block, enter, leave
from lipass.runtime.turns import Turns, check_stream

if TYPE_CHECKING:
    from lipass.runtime.chunk import Chunk
    from lipass.runtime.given import GivenChunks
    from lipass.runtime.merged_history import MergedHistories
    from lipass.runtime.pace import Pace
    from lipass.runtime.prompts import Prompts
    from lipass.runtime.replay import Replay
    from lipass.runtime.written_slots import WrittenSlots
    from lipass.session import Session


class Streamed:
    """What a `Session` can do with its streams."""

    given: GivenChunks
    histories: MergedHistories
    pace: Pace | None
    prompts: Prompts
    recorded: Replay | None
    turns: Turns
    written: WrittenSlots

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

    def forget(self, stream: str) -> None:
        """Drop all that is kept of a stream that has ended, and of its branches.

        What was merged of its history, its prompts and its turns stay until then: a server says
        so of a request that is done, and a loop that goes back of the stream that it leaves. The
        receipt stays, and the name is as good as new.

        Args:
            stream: name of it; of one that nobody knows there is nothing to drop.

        Raises:
            TypeError, ValueError: what cannot name a stream.
            LipassError: the stream has an open chunk.
        """
        self.turns.forget(stream)
        for one in (self.given, self.histories, self.written, self.prompts):
            one.forget(stream)
        for maybe in (self.recorded, self.pace):
            if maybe is not None:
                maybe.forget(stream)
