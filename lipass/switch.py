"""Switch lipass off at once, without touching the code that uses it.

`LIPASS=off` in the environment of a process compiles every model with its inner compiler alone.
`lipass.disabled()` does the same for calls made inside of a block: models that are compiled run
their dense form, and sessions keep every latent and compute every step.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

_VARIABLE = "LIPASS"
_off: contextvars.ContextVar[bool] = contextvars.ContextVar("lipass_off", default=False)


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Compute everything that is called inside of the block, and choose nothing.

    Chunks that are opened inside keep all of their history and take all of their steps. A chunk
    that was opened before keeps its plan, but none of its model calls are sparse, pruned by the
    graph or answered from an earlier one.
    """
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def is_off() -> bool:
    """Whether the caller is inside of `disabled`, or the process has `LIPASS=off`."""
    return _off.get() or process_is_off()


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
