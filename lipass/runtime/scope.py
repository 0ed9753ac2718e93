"""Know which sessions, chunks and steps are open where the model is being called.

One context variable holds them, so threads and tasks do not see each other's.
"""

from __future__ import annotations

import contextvars
from dataclasses import dataclass

_open: contextvars.ContextVar[tuple[object, ...]] = contextvars.ContextVar("open", default=())


@dataclass(frozen=True)
class Branch:
    """A named part of a session's model calls, such as one side of classifier-free guidance."""

    session: object
    name: str


def open_items() -> tuple[object, ...]:
    """List what is open, innermost last."""
    return _open.get()


def enter(item: object) -> None:
    """Open an item."""
    _open.set((*_open.get(), item))


def leave(item: object) -> None:
    """Close the latest entry of an item; blocks of interleaved generators end in any order."""
    items = list(_open.get())
    for place in reversed(range(len(items))):
        if items[place] is item:
            del items[place]
            break
    _open.set(tuple(items))


def branch_name(session: object) -> str:
    """Name the innermost open branch of a session; "" outside of branches."""
    for item in reversed(_open.get()):
        if isinstance(item, Branch) and item.session is session:
            return item.name
    return ""
