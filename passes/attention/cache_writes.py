"""Read which tokens of a preallocated cache a call reads or writes, in the spellings of slices."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import Size, value

_INDEX_COPIES = ("index_copy_", "index_copy", torch.index_copy)
_ADDS = (operator.add, torch.add, "add")
_SLICE_SCATTERS = ("slice_scatter", torch.slice_scatter)


@dataclass(frozen=True)
class Place:
    """Name the tokens `start:stop` of a cache along one axis; ends are ints or nodes."""

    cache: Node
    axis: int
    start: Any
    stop: Any

    def first(self) -> Size:
        """Return the position of the first token."""
        position: Size = 0 if self.start is None else value(self.start)
        return position

    def last(self) -> Size:
        """Return the position behind the last token."""
        size = value(self.cache).shape[self.axis]
        position: Size = size if self.stop is None else value(self.stop)
        return position


def place_read(node: Node, axis: int) -> Place | None:
    """Return what a slice along `axis` reads; the whole of a node that is no slice."""
    if not is_call(node, operator.getitem):
        return Place(node, axis, None, None)
    place = _indexed(node.args[0], node.args[1])
    return place if place is not None and place.axis == axis else None


def written(write: Node) -> tuple[Place, Node] | None:
    """Return which tokens of a cache a call writes in place, and with what."""
    if is_call(write, operator.setitem):
        return _with(_indexed(write.args[0], write.args[1]), write.args[2])
    if is_call(write, "copy_") and is_call(write.args[0], operator.getitem):
        view: Any = write.args[0]
        return _with(_indexed(*view.args), write.args[1])
    return _index_copied(write) if is_call(write, "index_copy_") else None


def scattered(node: Node) -> tuple[Place, Node] | None:
    """Return which tokens of a copy of a cache are new, and what they are."""
    if node.op in ("call_method", "call_function") and node.target in _SLICE_SCATTERS:
        names = ("input", "src", "dim", "start", "end", "step")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get("step", 1) != 1 or not isinstance(given.get("dim", 0), int):
            return None
        axis = given.get("dim", 0) % value(node).dim()
        place = _place(node, axis, given.get("start"), given.get("end"))
        return _with(place, given.get("src"))
    return _index_copied(node) if node.target in _INDEX_COPIES[1:] else None


def _index_copied(node: Node) -> tuple[Place, Node] | None:
    """Read `cache.index_copy(axis, positions, new)`, in place or not."""
    names = ("input", "dim", "index", "source")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    cache = given.get("input") if node.target == "index_copy_" else node
    axis, index = given.get("dim"), given.get("index")
    span = _span(index)
    if not isinstance(axis, int) or not isinstance(cache, Node) or span is None:
        return None
    return _with(_place(cache, axis % value(cache).dim(), *span), given.get("source"))


def _with(place: Place | None, new: object) -> tuple[Place, Node] | None:
    if place is None or not isinstance(new, Node) or not isinstance(value(new), torch.Tensor):
        return None
    return place, new


def _indexed(cache: object, index: object) -> Place | None:
    """Return the place of an index that cuts one axis."""
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(cache, Node) or not isinstance(value(cache), torch.Tensor):
        return None
    ends: list[tuple[int, Any, Any]] = []
    for axis, part in enumerate(parts):
        if isinstance(part, slice):
            if part.step not in (None, 1):
                return None
            if (part.start, part.stop) != (None, None):
                ends.append((axis, part.start, part.stop))
        elif (span := _span(part)) is not None:
            ends.append((axis, *span))
        else:
            return None
    return _place(cache, *ends[0]) if len(ends) == 1 else None


def _place(cache: Node, axis: int, start: Any, stop: Any) -> Place | None:
    """Return a place whose ends do not count from the end of the cache."""
    if any(isinstance(end, int) and end < 0 for end in (start, stop)):
        return None
    return Place(cache, axis, start, stop)


def _span(index: object) -> tuple[Any, Any] | None:
    """Return `(start, stop)` of positions that are `arange(start, stop)`, shifted or not."""
    if not isinstance(index, Node):
        return None
    if any(is_call(index, add) for add in _ADDS) and len(index.args) == 2 and not index.kwargs:
        for positions, by in (index.args, index.args[::-1]):
            span = _span(positions)
            if span is not None and _is_size(by) and span[0] == 0:
                return by, value(span[1]) + value(by)
        return None
    if not is_call(index, torch.arange) or not index.kwargs.keys() <= {"device", "dtype"}:
        return None
    ends = index.args if len(index.args) > 1 else (0, *index.args)
    if len(ends) > 2 and ends[2:] != (1,):
        return None
    return (ends[0], ends[1]) if all(map(_is_size, ends[:2])) else None


def _is_size(end: object) -> bool:
    return isinstance(value(end), (int, torch.SymInt))
