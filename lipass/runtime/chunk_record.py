"""Sum up what a chunk did, when its block is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lipass.receipt import ChunkRecord
from lipass.switch import is_off

if TYPE_CHECKING:
    from lipass.runtime.chunk import Chunk


def record_of(chunk: Chunk, seconds: float, *, compiled: bool) -> ChunkRecord:
    """Return the receipt of a chunk.

    Args:
        chunk: that has been left.
        seconds: wall time between entering and leaving it.
        compiled: whether something was compiled meanwhile.
    """
    session = chunk.session
    return ChunkRecord(
        session.number,
        chunk.plan,
        seconds,
        chunk.lookups,
        chunk.misses,
        dict(chunk.why_missed),
        chunk.latents_read,
        chunk.steps_skipped(),
        "off" if is_off() else session.config.preset,
        compiled,
        None if session.pace is None else session.pace.target_ms,
        len(chunk.coarse.taken),
    )
