"""Carry what is known of runs of equal values over reshapes, expansions and broadcasting."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from lipass.passes.graph.compat import Size, divides, hint, known_true, value

ALL = None
"""The run of an axis along which nothing changes."""
Run = Size | None


@dataclass(frozen=True)
class Runs:
    """Hold for each axis how many neighbours, counted from 0, are sure to be equal."""

    runs: tuple[Run, ...]
    counts_axis: int | None = None
    """The axis whose positions the values are, for `arange`."""
    offset: int = 0
    """What is added to them."""


def of_reshape(source: Node, node: Node, given: Runs) -> Runs | None:
    """Carry runs over axes that are merged or split; axes of one come and go."""
    above = [(n, run) for n, run in zip(value(source).shape, given.runs, strict=True)]
    places = [axis for axis, (n, _) in enumerate(above) if not known_true(n == 1)]
    kept = [axis for axis, n in enumerate(value(node).shape) if not known_true(n == 1)]
    runs: list[Run] = [ALL] * value(node).dim()
    counts = None
    i = j = 0
    while i < len(places) and j < len(kept):
        left, right = [places[i]], [kept[j]]
        a, b = above[places[i]][0], value(node).shape[kept[j]]
        while not known_true(a == b):
            if hint(a) == hint(b):
                return None
            if hint(a) < hint(b):
                i += 1
                if i == len(places):
                    return None
                left.append(places[i])
                a = a * above[places[i]][0]
            else:
                j += 1
                if j == len(kept):
                    return None
                right.append(kept[j])
                b = b * value(node).shape[kept[j]]
        merged = _merged([above[axis] for axis in left])
        for axis, run in zip(reversed(right), _split(merged, node, right), strict=True):
            runs[axis] = run
        if left == [given.counts_axis] and len(right) == 1:
            counts = right[0]
        i, j = i + 1, j + 1
    return Runs(tuple(runs), counts, given.offset)


def _merged(axes: list[tuple[Size, Run]]) -> Run:
    """Return the run of axes that become one, the last of which moves fastest."""
    inside: Size = 1
    for place, (size, run) in reversed(list(enumerate(axes))):
        if run is ALL or known_true(run >= size):
            inside = inside * size
        elif place == 0 or known_true(divides(run, size)):
            return inside * run
        else:
            return inside
    return ALL


def _split(run: Run, node: Node, axes: list[int]) -> list[Run]:
    """Return the runs of the axes into which one is split, the last of them first."""
    found: list[Run] = []
    for axis in reversed(axes):
        size = value(node).shape[axis]
        if run is ALL or known_true(divides(size, run)):
            found.append(ALL)
            run = run if run is ALL else run // size
        else:
            fits = axis == axes[0] or known_true(divides(run, size))
            found.append(run if fits else 1)
            run = 1
    return found


def of_expansion(source: Node, node: Node, given: Runs) -> Runs:
    """Carry runs over copies along axes, whether of one or of many."""
    above, below = value(source).shape, value(node).shape
    runs: list[Run] = [ALL] * len(below)
    counts = given.counts_axis
    first = len(below) - len(above)
    for axis, run in aligned(above, given.runs, below):
        size = above[axis - first]
        same = known_true(size == below[axis])
        # each copy of an axis starts a run
        runs[axis] = run if run is ALL or same or known_true(divides(run, size)) else 1
        if not same and counts == axis - first:
            counts = None
    return Runs(tuple(runs), None if counts is None else first + counts, given.offset)


def aligned(above: torch.Size, runs: tuple[Run, ...], below: torch.Size) -> list[tuple[int, Run]]:
    """List the runs along axes of a result to which a tensor is broadcast."""
    first = len(below) - len(above)
    return [
        (first + axis, ALL if known_true(above[axis] == 1) else run)
        for axis, run in enumerate(runs)
    ]


def both(a: Run, b: Run) -> Run:
    """Return the run of what depends on two tensors."""
    if a is ALL or b is ALL:
        return b if a is ALL else a
    if isinstance(a, int) and isinstance(b, int):
        return math.gcd(a, b)
    if known_true(divides(a, b)):
        return a
    return b if known_true(divides(b, a)) else 1
