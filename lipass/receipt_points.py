"""Say at which points of a frontier chunks were made, and how they kept time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lipass.receipt import ChunkRecord


def points(chunks: Iterable[ChunkRecord]) -> Iterator[str]:
    """Give a sentence a session that had a target."""
    sessions: dict[int, list[ChunkRecord]] = {}
    for one in chunks:
        if one.plan.point is not None:
            sessions.setdefault(one.session, []).append(one)
    for number, own in sessions.items():
        used = Counter(one.plan.point for one in own)
        moves = sum(a.plan.point != b.plan.point for a, b in itertools.pairwise(own))
        shares = ", ".join(f"{name!r} in {count}" for name, count in used.most_common())
        said = f"session {number}, points of its frontier: {shares} of {len(own)} chunks"
        said += f", moved {moves} times" if moves else ""
        yield f"{said}; {kept}" if (kept := _kept(own)) else said


def _kept(own: list[ChunkRecord]) -> str:
    """Compare the slowest but one of twenty with the target; compiling is not counted."""
    timed = sorted(one.seconds * 1e3 for one in own if not one.compiled)
    target = own[-1].target_chunk_ms
    if target is None or not timed:
        return ""
    return f"95% took at most {percentile(timed, 0.95):.0f} ms, for a target of {target:g}"


def percentile(ascending: list[float], share: float) -> float:
    """Return what a share of the values is not above: one of them, the nearest rank."""
    place = -(-share * len(ascending) // 1)
    return ascending[max(int(place) - 1, 0)]
