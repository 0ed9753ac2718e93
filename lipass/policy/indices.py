"""Check which latents of the history a loop says that it holds or reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def as_plain(given: Any) -> Any:
    """Return what a loop says of latents, as plain numbers where it is a tensor or an array."""
    return given.tolist() if hasattr(given, "tolist") else given


def indices_of(given: object, history: int, name: str) -> list[int]:
    """Check which latents a loop says that it has or reads.

    Raises:
        TypeError: no list of ints.
        ValueError: an index outside the history or given twice.
    """
    plain = as_plain(given)
    if not isinstance(plain, Sequence | range) or any(type(index) is not int for index in plain):
        kind = "one number" if type(plain) is int else repr(given)
        raise TypeError(
            f"{name} must be a list of ints, indices into the history, got {kind:.60}; of a mask, "
            "pass the places where it is true"
        )
    if len(set(plain)) != len(plain) or not all(0 <= index < history for index in plain):
        raise ValueError(
            f"{name} must hold indices of the {history} history latents, each once, got "
            f"{list(plain)}; count from 0, the oldest"
        )
    return list(plain)
