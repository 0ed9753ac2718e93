"""Calibrate: find the options of a model that are worth their time, on walks of its own.

1. The dense model rolls all walks out: what is compared with, and what dense chunks take.
2. Graphs with dense and sparse attention are timed in turn, and one is taken for all points.
3. A few choices are timed in turn, and a cost is fitted to their chunks.
4. A search tries choices by their results; times are foreseen by the cost.
5. What is left is rolled out in turn with the dense model, several times, and timed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lipass._version import VERSION
from lipass.calibration.density import Density
from lipass.calibration.device import device_name
from lipass.calibration.frontier import Frontier, undominated
from lipass.calibration.ladders import choice_of
from lipass.calibration.ledger import Ledger
from lipass.calibration.search import frontier, thinned
from lipass.calibration.spectrum import spectrum_of
from lipass.calibration.subject import RollOut, Subject
from lipass.calibration.told import plain
from lipass.calibration.work import Advance, Work, room_for_graphs
from lipass.calibration.worth import Worth

_POINTS_MOST = 8


@dataclass(frozen=True)
class Calibration:
    """What a calibration has found.

    Attributes:
        frontier: what sessions choose from.
        tried: all that was tried: label, foreseen ms of a chunk, dB, whether on all walks.
        again_db: of the dense model to itself, in a second rollout: no dB above it mean anything.
        worth: what single history latents are worth to a chunk.
        densities: what dense and sparse attention did, where both were tried.
        seconds: it took.
    """

    frontier: Frontier
    tried: list[dict[str, Any]] = field(repr=False)
    again_db: float
    worth: list[Worth] = field(repr=False)
    densities: list[Density] = field(repr=False)
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Give plain data."""
        return plain(self)


def calibrate(
    model: Any,
    roll_out: RollOut,
    walks: Mapping[str, Any] | Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    tries: int = 40,
    repeats: int = 3,
    default_db: float = 38.0,
    frames: int = 24,
    compiled: bool = True,
    keep: str | os.PathLike[str] | None = None,
    earlier: Frontier | None = None,
    advance: Advance = lambda step="", done=1: None,
) -> Calibration:
    """Find the frontier of a model between time and quality.

    Args:
        model: what `roll_out` is called with; a module is compiled, dense and with `options`.
        roll_out: `(model, walk, session)` to what was generated: frames or latents, one tensor.
        walks: training walks, whatever the loop takes for one, in a list or by name.
        options: flat ones that all points share, such as the camera; preset "all" without any.
        tries: choices of options at most.
        repeats: rollouts of each point that are timed, in turn with the dense model.
        default_db: the default point is the fastest that has so many dB.
        frames: history latents of which is asked what each is worth; 0 asks none.
        compiled: whether a module is compiled; False rolls it out as it is.
        keep: file of results, which a second call goes on from.
        earlier: of this model or another; its points are tried first, and measured anew.
        advance: is told of progress.

    Raises:
        TypeError, ValueError: arguments that are none, or options that `Config.resolve` refuses.
        LipassError: a loop that makes no chunks, or is another one each time.
    """
    begin = time.perf_counter()
    if tries < 1 or repeats < 1:
        raise ValueError(
            f"tries and repeats must be at least 1, got {tries} and {repeats}; leave them out"
        )
    if earlier is not None and not isinstance(earlier, Frontier):
        raise TypeError(
            f"earlier must be a Frontier, got {type(earlier).__name__}; lipass.Frontier.load "
            "reads one from a file"
        )
    if compiled and hasattr(model, "_orig_mod"):
        raise ValueError(
            "a model must be one that a calibration can compile, dense and with its options, got "
            "one that is compiled; pass the module itself (model._orig_mod), or compiled=False to "
            "roll it out as it is"
        )
    work = Work(Subject.of(model, roll_out, walks), dict(options or {}), compiled, advance)
    with room_for_graphs():
        work.roll_out_dense()
        work.choose_ladders()
        work.choose_density()
        work.fit_cost()
        known = [
            choice_of(work.ladders, work.shared, one.options)
            for one in ([] if earlier is None else earlier.points)
        ]
        tried = work.search(tries, Ledger(keep, work.marked()), default_db, known)
        timed = work.timed(thinned(frontier(tried), _POINTS_MOST, default_db), repeats)
        worth = work.worth(frames)
    points = undominated(timed)
    best = [one for one in points if one.db >= default_db]
    found = Frontier(
        options=work.shared,
        points=tuple(points),
        cost=work.cost,
        default=(best[-1] if best else points[0]).name,
        dense_ms=round(work.dense_ms, 3),
        model=work.mark,
        walks=tuple(work.subject.walks),
        environment={
            "device": device_name(),
            "lipass": VERSION,
            "torch": str(torch.__version__),
            "python": sys.version.split()[0],
            "tries": len(tried),
            "repeats": repeats,
            **spectrum_of(work.dense_runs.values()),
        },
    )
    seconds = time.perf_counter() - begin
    return Calibration(found, work.told(tried), work.again_db, worth, work.densities, seconds)
