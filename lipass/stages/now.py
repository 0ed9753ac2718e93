"""Know which item a stage is computing, and whether anybody still wants it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Job:
    """One item in the hands of a stage."""

    number: int
    stale: bool = False


_now: contextvars.ContextVar[Job | None] = contextvars.ContextVar("lipass_stage", default=None)


class Stale(Exception):
    """Raise it in a stage whose item is stale, to leave it half done.

    What a stage returns counts as made, and its `forget(count)` takes it back. What is left by
    this has made nothing, so nothing is taken back for it. Of an item that is not stale it is an
    error like any other.
    """


def is_stale() -> bool:
    """Whether the item that the caller, a stage, is computing has been given up.

    What the stage returns is then thrown away, so it may raise `Stale` at once, such as between
    two denoising steps. One that returns has made a result that nobody sees, and its
    `forget(count)` counts that. False outside of stages.
    """
    job = _now.get()
    return job is not None and job.stale


@contextlib.contextmanager
def computing(job: Job) -> Iterator[None]:
    """Let `is_stale` answer for an item inside of the block."""
    token = _now.set(job)
    try:
        yield
    finally:
        _now.reset(token)
