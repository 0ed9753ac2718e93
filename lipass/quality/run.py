"""Roll out what is missing, and measure it."""

from __future__ import annotations

from collections.abc import Callable

from lipass.errors import LipassError
from lipass.quality import checks, verdicts
from lipass.quality.figures import Rollout, Scene, measure, worst_and_typical
from lipass.quality.results import Entry, Results
from lipass.quality.shown import tiles
from lipass.quality.subject import Case, Subject


def missing(subject: Subject, results: Results) -> list[tuple[Case, list[str]]]:
    """Name what is not there yet: cases with the methods that lack, each once."""
    found = []
    for case in dict.fromkeys(subject.cases):
        every = dict.fromkeys(subject.methods)
        methods = [method for method in every if (method, case) not in results]
        if methods:
            found.append((case, methods))
    return found


def evaluate(subject: Subject, results: Results, advance: Callable[..., None]) -> None:
    """Roll out and measure what `results` lacks; each rollout is written before the next begins.

    The dense model comes first in each case, and again where a run goes on in the middle of one:
    its pictures are what others are compared with, and are kept nowhere.

    Args:
        subject: the model.
        results: what there is; grows.
        advance: is told of each rollout that was written, and with `done=0` of what is under way.

    Raises:
        LipassError: the dense model makes pictures that nothing can be compared with.
    """
    for case, methods in missing(subject, results):
        advance(f"{case}", done=0)
        scene = subject.scene(case)
        dense_name = subject.methods[0]
        dense = _checked(subject.roll_out(dense_name, case, scene), dense_name, case)
        dense_values = measure(dense, scene)
        for method in methods:
            if method == dense_name:
                results.add(Entry(method, case, dense_values, None, _dense_shown(dense, scene)))
            else:
                results.add(
                    _entry(method, case, scene, subject.roll_out(method, case, scene), dense,
                           dense_values)
                )  # fmt: skip
            advance(f"{case}: {method}")


def _checked(dense: Rollout, name: str, case: Case) -> Rollout:
    try:
        checks.pictures(dense.frames, f"frames of {name!r}, to which all are compared, on {case},")
    except (TypeError, ValueError) as error:
        raise LipassError(str(error)) from None
    return dense


def _entry(
    method: str, case: Case, scene: Scene, made: Rollout, dense: Rollout, dense_values: dict
) -> Entry:
    values = measure(made, scene, dense)
    said = verdicts.of(values, dense_values)
    if checks.broken(made.frames, "frames").any():
        return Entry(method, case, values, said.value)
    at = worst_and_typical(made, dense.frames, scene)
    films = {"truth": scene.truth, "dense": dense.frames, method: made.frames}
    return Entry(method, case, values, said.value, tiles(films, at))


def _dense_shown(dense: Rollout, scene: Scene) -> str:
    if scene.truth is None:
        return ""
    at = worst_and_typical(dense, scene.truth, scene)
    return tiles({"truth": scene.truth, "dense": dense.frames}, at)
