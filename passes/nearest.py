"""Find what somebody meant by a name that is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Below this share of equal letters two words have nothing to do with each other.
_ALIKE = 0.65
_SHOWN = 3


def nearest(word: object, known: Iterable[str]) -> list[str]:
    """Return the names that come next to a word, the nearest first; none where none is near.

    A name with dots is also known by what stands behind them, and by a part of that.
    """
    names = list(known)
    asked = _plain(str(word))
    if not asked:
        return []
    tail = asked.rpartition(".")[2]
    for is_it in (
        lambda name: _plain(name) == asked,
        lambda name: "." not in asked and _tail(name) == asked,
        lambda name: "." not in asked and len(asked) > 2 and asked in _tail(name).split("_"),
    ):
        if found := [name for name in names if is_it(name)]:
            short = [name for name in found if "." not in name]
            return (short or found)[:_SHOWN]  # a name that stands for several says all
    scores = {
        name: max(
            _share(asked, _plain(name)),
            # the same option of a section or pass that is spelt wrongly, or of another one
            _share(asked if "." in name and "." not in asked else tail, _tail(name)) - 0.1,
        )
        for name in names
    }
    best = max(scores.values(), default=0.0)
    return [name for name in names if scores[name] == best >= _ALIKE][:_SHOWN]


def did_you_mean(word: object, known: Iterable[str], otherwise: str) -> str:
    """Return `did you mean 'x'?`, or another remedy where nothing is near.

    Args:
        word: what was written.
        known: what could have been.
        otherwise: what to do where nothing is like it.
    """
    found = nearest(word, known)
    if not found:
        return otherwise
    return f"did you mean {' or '.join(map(repr, found))}?"


def _plain(text: str) -> str:
    return text.strip().lower().replace("-", "_")


def _tail(name: str) -> str:
    return _plain(name).rpartition(".")[2]


def _share(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
