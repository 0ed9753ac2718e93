"""Search settings for the frontier between time and quality, one setting a step.

From each choice that nothing tried so far is both faster and closer than, one ladder is moved by
one rung; what is not dominated joins. Every other try is next to the choice that would be the
default: most people use no other. A choice is tried walk by walk and given up as soon as
another one is clearly better on the walks so far, so most of the time goes to what is near the
frontier. Times are foreseen, not measured: a search gives the same choices on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

Choice = tuple[int, ...]
"""A rung of each ladder."""

# Given up where another choice has so much more on the walks so far, in no more time.
_CLEARLY_DB = 1.5
_WALKS_LEAST = 2


@dataclass(frozen=True)
class Tried:
    """What one choice did on the walks that it was tried on.

    Attributes:
        choice: rungs.
        ms: of each walk, foreseen.
        dbs: of each walk, to the dense model.
        whole: whether all walks were tried.
    """

    choice: Choice
    ms: tuple[float, ...]
    dbs: tuple[float, ...]
    whole: bool = True

    @property
    def time(self) -> float:
        """Mean over walks, in ms."""
        return sum(self.ms) / len(self.ms)

    @property
    def db(self) -> float:
        """Mean over walks."""
        return sum(self.dbs) / len(self.dbs)


def frontier(tried: Sequence[Tried]) -> list[Tried]:
    """Return those that no other is faster and closer than, from the closest to the fastest."""
    kept: list[Tried] = []
    for one in sorted(
        (one for one in tried if one.whole), key=lambda one: (one.time, -one.db, one.choice)
    ):
        if not kept or one.db > kept[-1].db:
            kept.append(one)
    return kept[::-1]


def fastest(found: Sequence[Tried], db: float) -> Tried | None:
    """Return the last of a frontier that has so many dB."""
    return next((one for one in reversed(found) if one.db >= db), None)


def search(
    rungs: Sequence[int],
    starts: Sequence[Choice],
    walks: int,
    measure: Callable[[Choice, int], tuple[float, float]],
    tries: int,
    default_db: float,
    note: Callable[[Tried], None] = lambda tried: None,
) -> list[Tried]:
    """Try choices until none is left to try or `tries` are spent.

    Args:
        rungs: of each ladder, how many there are.
        starts: where to begin; all of them are tried on all walks.
        walks: how many there are.
        measure: time in ms and dB of a choice on a walk.
        tries: choices at most, starts included.
        default_db: what the default must have: the fastest that does is looked around most.
        note: is told of each.

    Returns:
        All that were tried, in order.
    """
    done: dict[Choice, Tried] = {}

    def attempt(choice: Choice, *, whole: bool) -> None:
        ms, dbs = [], []
        for walk in range(walks):
            took, db = measure(choice, walk)
            ms.append(took)
            dbs.append(db)
            if not whole and walk + 1 >= _WALKS_LEAST and _beaten(ms, dbs, done.values()):
                break
        done[choice] = Tried(choice, tuple(ms), tuple(dbs), len(ms) == walks)
        note(done[choice])

    for start in dict.fromkeys(starts):
        if len(done) < tries:
            attempt(start, whole=True)
    expanded: dict[Choice, int] = {}
    while len(done) < tries:
        front = frontier(list(done.values()))
        # Those that were looked around least come first: no part of the frontier is left behind.
        # Of equal ones from both ends in turn.
        sign = 1 if len(done) % 2 else -1
        order = sorted(front, key=lambda one: (expanded.get(one.choice, 0), sign * one.time))
        if len(done) % 2 and (default := fastest(front, default_db)):
            order.insert(0, default)
        found = next(
            ((one.choice, near) for one in order for near in around(one.choice, rungs)
             if near not in done),
            None,
        )  # fmt: skip
        if found is None:
            break
        expanded[found[0]] = expanded.get(found[0], 0) + 1
        attempt(found[1], whole=False)
    return list(done.values())


def around(choice: Choice, rungs: Sequence[int]) -> Iterator[Choice]:
    """Give the choices that are one rung away, the cheaper ones first."""
    for step in (1, -1):
        for place, count in enumerate(rungs):
            if 0 <= choice[place] + step < count:
                yield (*choice[:place], choice[place] + step, *choice[place + 1 :])


def _beaten(ms: Sequence[float], dbs: Sequence[float], others: Iterable[Tried]) -> bool:
    count = len(ms)
    return any(
        len(one.ms) >= count
        and sum(one.ms[:count]) <= sum(ms)
        and sum(one.dbs[:count]) > sum(dbs) + _CLEARLY_DB * count
        for one in others
    )


def thinned(found: Sequence[Tried], most: int, default_db: float) -> list[Tried]:
    """Leave out those whose neighbours take nearly as long, until there are few enough.

    Both ends stay, and what would be the default.
    """
    kept, default = list(found), fastest(found, default_db)
    while len(kept) > max(most, 3):
        inner = [i for i in range(1, len(kept) - 1) if kept[i] is not default]
        del kept[min(inner, key=lambda i: kept[i - 1].time / kept[i + 1].time)]
    return kept
