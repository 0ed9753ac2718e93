"""What messages and walks may name, all of it closed, and what a world may call it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lipass.errors import LipassError
from lipass.play.world import World

# Walks are text for links, and split at other signs.
WORD, PRESET = "[a-z0-9-]{1,20}", "[a-z0-9-]{1,30}"
# Degrees have three digits in a walk.
_LOOK_MAX, _ROOMS_MAX = 720, 2**31


@dataclass(frozen=True)
class Vocabulary:
    """Words by group, presets, number of rooms."""

    words: Mapping[str, Sequence[str]]
    presets: Sequence[str]
    rooms: int

    @classmethod
    def of(cls, world: World) -> Vocabulary:
        """Take the one of a world.

        Raises:
            LipassError: a walk through the world could not be written and read back.
        """
        if not isinstance(world.words, Mapping):
            raise LipassError(
                f"words of a world must be groups by name, got {world.words!r:.40}; such as "
                "{'time': ('day', 'night')}"
            )
        groups = [(f"words of group {name!r}", group) for name, group in world.words.items()]
        for what, names in (*groups, ("presets", world.presets)):
            _check_list(what, names)
        words = [word for group in world.words.values() for word in group]
        for word in words:
            _check_name("a word", word, WORD, 20)
            if words.count(word) > 1:
                raise LipassError(
                    f"a word of a world must be in one group, once, got {word!r} again; call one "
                    f"of them such as {f'{word}-2'!r}"
                )
        for preset in world.presets:
            _check_name("a preset", preset, PRESET, 30)
        _check_number("look", world.look, 0, _LOOK_MAX)
        _check_number("rooms", world.rooms, 1, _ROOMS_MAX)
        _check_number("room", world.room, 0, world.rooms - 1)
        return cls(world.words, world.presets, world.rooms)

    def group_of(self, word: str) -> str | None:
        """Return the group of a word; None for a word of none."""
        return next((name for name, group in self.words.items() if word in group), None)


def _check_list(what: str, names: Any) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise LipassError(
            f"{what} of a world must be a list of one name or more, got {names!r:.40}; such as "
            "('day', 'night')"
        )


def _check_name(what: str, name: Any, pattern: str, longest: int) -> None:
    if isinstance(name, str) and re.fullmatch(pattern, name):
        return
    plain = re.sub("[^a-z0-9]+", "-", str(name).lower())[:longest].strip("-") or "golden-hour"
    raise LipassError(
        f"{what} of a world must be 1 to {longest} of the letters a-z, digits and hyphens, as "
        f"links to walks hold it, got {name!r:.60}; use one such as {plain!r}"
    )


def _check_number(what: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise LipassError(
            f"{what} of a world must be a whole number from {low} to {high}, got {value!r:.40}; "
            f"use one such as {low}"
        )
