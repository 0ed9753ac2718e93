"""Prove that a tensor is one value over runs of an axis, such as over the tokens of a latent.

A mask that a graph builds from `arange`, comparisons, repetitions and reshapes is a function of
the latents of query and key if it is constant on runs of `Y * X` tokens along both axes. That
follows from the calls that make it, for all sizes of the graph; values are never read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from lipass.passes.attention.run_shapes import (
    ALL,
    Run,
    Runs,
    aligned,
    both,
    of_expansion,
    of_reshape,
)
from lipass.passes.graph.compat import Size, divides, known_true, value
from lipass.passes.graph.ops import (
    argument,
    is_cast,
    is_copy,
    is_expansion,
    is_pointwise,
    is_reshape,
    moved_axes,
    name_of,
)
from lipass.passes.graph.writes import mutates, shares_memory, writers_of

Ask = Callable[[Node], Runs]
_DEPTH = 100
"""Masks are made in a few calls; what takes more is computed from latents."""


def runs_of(node: Node, known: dict[Node, Runs] | None = None, depth: int = 0) -> Runs:
    """Return what is sure of a tensor; runs of 1 are sure of any."""
    known = {} if known is None else known
    if node not in known:
        tensor = value(node)
        rank = tensor.dim() if isinstance(tensor, torch.Tensor) else 0
        found = None
        if depth < _DEPTH:
            found = _with_writes(node, lambda one: runs_of(one, known, depth + 1))
        if found is None or len(found.runs) != rank:
            found = Runs((1,) * rank)
        known[node] = found
    return known[node]


def _with_writes(node: Node, ask: Ask) -> Runs | None:
    """Return what is sure of a tensor before and after all that is written to it in place."""
    if mutates(node):
        source = node.all_input_nodes[0]
        return ask(source) if is_pointwise(node, in_place=True) else None
    found = _of_call(node, ask)
    if found is None or any(shares_memory(node, one) for one in node.all_input_nodes):
        return found  # what is written to the memory of a view is asked of its source
    for write in writers_of(node):
        if write.all_input_nodes[0] is not node or not is_pointwise(write, in_place=True):
            return None
        others = [one for one in write.all_input_nodes if one is not node]
        found = Runs(_joined(value(node).shape, found, others, ask))
    return found


def is_run(part: Size, run: Run) -> bool:
    """Whether so many neighbours are equal where `run` are."""
    return run is ALL or known_true(divides(part, run))


_CONSTANT = {"ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "ones_like"}
_CONSTANT |= {"zeros_like", "full_like", "scalar_tensor"}
_POSITIONS = (torch.int64, torch.int32)
_COMPARES = {"lt": 0, "ge": 0, "le": 1, "gt": 1}
"""A comparison of positions with `c` changes at `c` plus so many."""
_FLIPPED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


def _of_call(node: Node, ask: Ask) -> Runs | None:
    if not node.op.startswith("call") or not isinstance(value(node), torch.Tensor):
        return None
    name, above = name_of(node), node.all_input_nodes
    if name in _CONSTANT:
        return Runs((ALL,) * value(node).dim())
    if name == "arange":
        return _of_arange(node)
    if not above:
        return None
    if is_cast(node) or is_copy(node):
        given = ask(above[0])
        # other kinds round positions, wrap them or only say whether they are 0
        return given if value(node).dtype in _POSITIONS else Runs(given.runs)
    if is_reshape(node):
        return of_reshape(above[0], node, ask(above[0]))
    if is_expansion(node) or name in ("repeat", "tile"):
        return of_expansion(above[0], node, ask(above[0]))
    if (axes := moved_axes(node)) is not None:
        given = ask(above[0])
        at = None if given.counts_axis is None else axes.index(given.counts_axis)
        return Runs(tuple(given.runs[axis] for axis in axes), at, given.offset)
    if name == "repeat_interleave":
        return _of_repeats(node, ask)
    if name == "getitem":
        return _of_index(node, ask)
    if name == "cat":
        return _of_cat(node, ask)
    if name in ("tril", "triu"):
        given = ask(above[0])
        return Runs((*given.runs[:-2], 1, 1))
    found = _of_positions(node, name, ask)
    if found is None and (name == "where" or is_pointwise(node)):
        found = _of_pointwise(node, ask)  # `where` makes tensors of numbers first
    return found


def _of_arange(node: Node) -> Runs | None:
    start = node.kwargs.get("start", node.args[0] if len(node.args) > 1 else 0)
    if isinstance(start, int) and argument(node, 2, "step", 1) == 1:
        return Runs((1,), 0, start)
    return None


def _of_positions(node: Node, name: str, ask: Ask) -> Runs | None:
    """Treat positions that are moved, divided into runs, or compared with a number."""
    if len(node.args) < 2:
        return None
    left, right = node.args[0], node.args[1]
    if isinstance(right, Node) and not isinstance(left, Node):
        left, right, name = right, left, _FLIPPED.get(name, name if name in ("add",) else "")
    number = _int(right)
    if not isinstance(left, Node) or number is None:
        return None
    given = ask(left)
    at = given.counts_axis
    if at is None:
        return None
    if name in ("add", "sub"):
        if not isinstance(number, int):
            return None
        return Runs(given.runs, at, given.offset + (number if name == "add" else -number))
    runs: Run = None
    if name == "floor_divide" or (name == "div" and node.kwargs.get("rounding_mode") == "floor"):
        if not (known_true(number > 0) and known_true(divides(number, given.offset))):
            return None
        runs = number
    elif name in _COMPARES:
        runs = number - given.offset + _COMPARES[name]
        if known_true(runs <= 0):
            return Runs((ALL,) * len(given.runs))
    else:
        return None
    return Runs(tuple(runs if axis == at else run for axis, run in enumerate(given.runs)))


def _int(given: object) -> Size | None:
    number = value(given)
    if isinstance(number, bool):
        return None
    return number if isinstance(number, (int, torch.SymInt)) else None


def _of_pointwise(node: Node, ask: Ask) -> Runs:
    shape = value(node).shape
    return Runs(_joined(shape, Runs((ALL,) * len(shape)), node.all_input_nodes, ask))


def _joined(shape: torch.Size, given: Runs, others: list[Node], ask: Ask) -> tuple[Run, ...]:
    """Return the runs of what is computed in each place from several tensors."""
    runs = list(given.runs)
    for one in others:
        tensor = value(one)
        if isinstance(tensor, torch.Tensor):
            for axis, run in aligned(tensor.shape, ask(one).runs, shape):
                runs[axis] = both(runs[axis], run)
    return tuple(runs)


def _of_repeats(node: Node, ask: Ask) -> Runs | None:
    source, times = node.args[0], argument(node, 1, "repeats")
    axis, number = argument(node, 2, "dim"), _int(times)
    if not isinstance(source, Node) or number is None:
        return None
    given = ask(source)
    if axis is None:
        if len(given.runs) != 1:
            return None
        axis = 0
    runs = list(given.runs)
    if (run := runs[axis]) is not ALL:
        runs[axis] = run * number
    return Runs(tuple(runs))


def _of_index(node: Node, ask: Ask) -> Runs | None:
    source, index = node.args[0], node.args[1]
    if not isinstance(source, Node) or not isinstance(value(source), torch.Tensor):
        return None
    parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    if any(isinstance(value(part), torch.Tensor) for part in parts):
        return _of_lookup(source, parts, value(node).shape, ask)
    given, shape = ask(source), value(source).shape
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    fill = [slice(None)] * (len(shape) - taken)
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts = (*parts[:at], *fill, *parts[at + 1 :])
    else:
        parts = (*parts, *fill)
    runs: list[Run] = []
    axis, counts, offset = 0, None, given.offset
    for part in parts:
        if part is None:
            runs.append(ALL)
            continue
        if isinstance(part, slice):
            run, begin = given.runs[axis], value(part.start) or 0
            if part.step not in (None, 1):
                run = run if run is ALL else 1
            elif run is not ALL and not _starts_run(begin, run):
                run = 1
            elif given.counts_axis == axis and isinstance(begin, int) and begin >= 0:
                counts, offset = len(runs), offset + begin
            runs.append(run)
        axis += 1
    return Runs(tuple(runs), counts, offset)


def _starts_run(begin: Size, run: Size) -> bool:
    return known_true(begin == 0) or (known_true(begin > 0) and known_true(divides(run, begin)))


def _of_lookup(source: Node, parts: tuple[Any, ...], shape: torch.Size, ask: Ask) -> Runs | None:
    """Treat numbers of a table, which are equal where their places in it are."""
    indices = [part for part in parts if isinstance(value(part), torch.Tensor)]
    if len(indices) != len(parts) or any(value(one).dtype == torch.bool for one in indices):
        return None
    if len(indices) != value(source).dim():
        return None
    runs: list[Run] = [ALL] * len(shape)
    table = ask(source)
    for place, one in enumerate(indices):
        found = ask(one)
        for axis, run in aligned(value(one).shape, found.runs, shape):
            counted = found.counts_axis == axis - (len(shape) - len(found.runs))
            if counted and found.offset == 0:
                # the row of a table at each place is the table itself
                run = table.runs[place]
            runs[axis] = both(runs[axis], run)
    return Runs(tuple(runs))


def _of_cat(node: Node, ask: Ask) -> Runs | None:
    pieces: Any = argument(node, 0, "tensors")
    axis = argument(node, 1, "dim", 0)
    rank = value(node).dim()
    if not isinstance(axis, int) or not all(isinstance(one, Node) for one in pieces):
        return None
    axis %= rank
    runs: list[Run] = [ALL] * rank
    start: Size = 0
    for piece in pieces:
        given, size = ask(piece), value(piece).shape[axis]
        for at, run in enumerate(given.runs):
            if at == axis:
                run = size if run is ALL else run
            runs[at] = both(runs[at], run)
        # a run begins where a piece does
        runs[axis] = both(runs[axis], start) if not known_true(start == 0) else runs[axis]
        start = start + size
    return Runs(tuple(runs))
