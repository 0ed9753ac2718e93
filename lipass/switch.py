"""Switch lipass off at once, without touching the code that uses it.

`LIPASS=off` in the environment of a process compiles every model with its inner compiler alone.
`lipass.disabled()` does the same for calls made inside of a block: models that are compiled run
their dense form, and sessions keep every latent and compute every step.

What runs inside of a block is found as `lipass.runtime.scope` finds it for chunks: by a context
variable, by the frame that entered it, and in a thread where neither says anything by the chunk
that it computes for.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import threading
from types import FrameType, TracebackType

_VARIABLE = "LIPASS"


class disabled(contextlib.ContextDecorator):
    """Compute everything that is called inside of the block, and choose nothing.

    Chunks that are opened inside keep all of their history and take all of their steps. A chunk
    that was opened before keeps its plan, but none of its model calls are sparse, pruned by the
    graph or answered from an earlier one.
    """

    def __init__(self) -> None:
        self._entered: list[_Off] = []

    def _recreate_cm(self) -> disabled:
        return disabled()  # a function that calls itself opens a block each time

    def __enter__(self) -> None:
        off = _Off(sys._getframe(1))
        self._entered.append(off)
        _here.set((*_here.get(), off))
        with _lock:
            _everywhere.append(off)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        off = self._entered.pop()
        off.frame, off.around = None, frozenset()
        with _lock:
            _everywhere.remove(off)
        # In another context than it was entered in, as of a generator, there is nothing to leave.
        _here.set(tuple(one for one in _here.get() if one.frame is not None))


class _Off:
    """One open block: the frame that entered it, None once it is closed, and those around it."""

    def __init__(self, frame: FrameType) -> None:
        self.frame: FrameType | None = frame
        self.around = frozenset(frames_above(frame))


_here: contextvars.ContextVar[tuple[_Off, ...]] = contextvars.ContextVar("lipass_off", default=())
_everywhere: list[_Off] = []
_lock = threading.Lock()


def is_off() -> bool:
    """Whether the caller is inside of `disabled`, or the process has `LIPASS=off`."""
    return (bool(_everywhere) and _is_inside()) or process_is_off()


def is_off_at(frame: FrameType | None) -> bool:
    """Whether a block was opened in a frame or in one that it has called."""
    with _lock:
        return any(frame in one.around for one in _everywhere)


def _is_inside() -> bool:
    if any(one.frame is not None for one in _here.get()):
        return True
    frames = set(frames_above(sys._getframe(2)))
    with _lock:
        if any(one.frame in frames for one in _everywhere):
            return True
    scope = sys.modules.get("lipass.runtime.scope")
    return scope is not None and scope.only_chunk_is_off()


def frames_above(frame: FrameType | None) -> list[FrameType]:
    """List a frame and those that it was called from, the nearest first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def process_is_off() -> bool:
    """Whether the process has `LIPASS=off`.

    Raises:
        ValueError: another value than "off" and "on".
    """
    given = os.environ.get(_VARIABLE)
    if given in (None, "", "on"):
        return False
    if given != "off":
        raise ValueError(f"{_VARIABLE} must be 'on' or 'off', got {given!r}; unset it")
    return True
