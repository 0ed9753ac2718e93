"""Cut keys that are read from a cache into what was in it and what the call has just written."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lipass.passes.attention.products import View
from lipass.passes.attention.site import set_pieces
from lipass.passes.core import PassContext
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.writes import memory_written, storage, writes_between


@dataclass(frozen=True)
class _Filled:
    """A slice of a cache along one axis whose end was written last."""

    cache: Node
    axis: int
    start: Any
    middle: Any
    """Where the written part begins; an int or a node."""
    written: Node
    axes: tuple[int, ...]
    """The keys are the slice with its axes in this order."""


def cut_cache(call: Node, ctx: PassContext) -> None:
    """Name the pieces of an attention call over slices of preallocated caches.

    ::

        %cache[:, :, 64:128] = %k;  %key = %cache[:, :, :128]
          keys are %cache[:, :, :64] | %k

    The views are inserted beside the call, which stays as it is; nobody reads them unless a pass
    takes the pieces.

    Keeps: caches that are written to again in between, or at more than one axis; reads that begin
    where the write does, or behind.
    """
    filled = [_filled(call.args[i], call) for i in (1, 2)]
    if any(one is None for one in filled):
        return
    pieces = [_emit(one, Emitter(call, ctx)) for one in filled if one is not None]
    set_pieces(call, tuple(pieces))


def _emit(filled: _Filled, emit: Emitter) -> tuple[str, str]:
    index = [slice(None)] * filled.axis + [slice(filled.start, filled.middle)]
    before = emit(operator.getitem, filled.cache, tuple(index))
    in_order = filled.axes == tuple(range(len(filled.axes)))
    pieces = [
        piece if in_order else emit.method("permute", piece, *filled.axes)
        for piece in (before, filled.written)
    ]
    return pieces[0].name, pieces[1].name


def _filled(keys: object, call: Node) -> _Filled | None:
    if not isinstance(keys, Node):
        return None
    view = View(keys, tuple(range(value(keys).dim()))).source()
    read = _slice(view.node)
    if read is None or len(view.axes) != 4 or view.axes[2] != read[1]:
        return None
    cache, axis, start, stop = read
    memory = storage(value(cache))
    earlier = [
        n
        for n in writes_between(next(iter(call.graph.nodes)), call)
        if memory in memory_written(n)
    ]
    if memory is None or not earlier:
        return None
    write = earlier[-1]
    place, written = _written(write)
    if place is None or not isinstance(written, Node) or place[0] is not cache:
        return None
    _, written_axis, middle, end = place
    if written_axis != axis or not _same(end, stop) or _order(write) > _order(view.node):
        return None
    if not known_true(_size(start) < _size(middle)):
        return None
    tokens = _size(end) - _size(middle)
    shape = value(written).shape
    expected = [tokens if i == axis else n for i, n in enumerate(value(cache).shape)]
    if len(shape) != len(expected):
        return None
    if not all(known_true(a == b) for a, b in zip(shape, expected, strict=True)):
        return None
    made = storage(value(written))
    if any(made in memory_written(n) for n in writes_between(write, call)):
        return None
    return _Filled(cache, axis, start, middle, written, view.axes)


def _written(write: Node) -> tuple[tuple[Node, int, Any, Any] | None, Any]:
    """Return which slice a write fills, and with what."""
    if write.target is operator.setitem:
        return _indexed(write.args[0], write.args[1]), write.args[2]
    if write.target == "copy_" and isinstance(write.args[0], Node):
        return _slice(write.args[0]), write.args[1]
    return None, None


def _slice(node: Node) -> tuple[Node, int, Any, Any] | None:
    return _indexed(node.args[0], node.args[1]) if is_call(node, operator.getitem) else None


def _indexed(cache: object, index: object) -> tuple[Node, int, Any, Any] | None:
    """Return `(cache, axis, start, stop)` of an index that cuts one axis."""
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(cache, Node) or not isinstance(value(cache), torch.Tensor):
        return None
    if not all(isinstance(part, slice) and part.step in (None, 1) for part in parts):
        return None
    cut = [i for i, part in enumerate(parts) if (part.start, part.stop) != (None, None)]
    if len(cut) != 1:
        return None
    part = parts[cut[0]]
    ends = [part.start, part.stop]
    if any(isinstance(end, int) and end < 0 for end in ends) or part.stop is None:
        return None
    return cache, cut[0], part.start, part.stop


def _same(a: Any, b: Any) -> bool:
    return a is b or known_true(_size(a) == _size(b))


def _size(end: Any) -> Any:
    return 0 if end is None else value(end)


def _order(node: Node) -> int:
    return list(node.graph.nodes).index(node)
