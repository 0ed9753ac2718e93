"""Cut keys that are read from a cache into what was in it and what the call has just written."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

# The import registers an operator that the module has to know.
import lipass.kernels.merged_history  # noqa: F401
from lipass.passes.attention import joint, latent_mask, match
from lipass.passes.attention.cache_writes import Place, place_read, scattered, written
from lipass.passes.attention.match import Operands, Refusal
from lipass.passes.attention.products import View
from lipass.passes.attention.site import AttentionSite
from lipass.passes.core import PassContext
from lipass.passes.graph.compat import Size, guard, holds_now, known_true, value
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.writes import memory_written, storage, writers_of, writes_between


@dataclass(frozen=True)
class _Filled:
    """A slice of a cache along one axis, part of which was written last."""

    read: Place
    at: Place
    """What was written of it; the end, or what a ring has come round to."""
    written: Node
    axes: tuple[int, ...]
    """The keys are the slice with its axes in this order."""

    def rest(self) -> tuple[tuple[Any, Any] | None, tuple[Any, Any] | None]:
        """Return the ends of what lies in front of the written part and behind it, if any does."""
        front, behind = (self.read.start, self.at.start or 0), (self.at.stop, self.read.stop)
        return (
            None if known_true(self.read.first() == self.at.first()) else front,
            None if known_true(self.at.last() == self.read.last()) else behind,
        )

    def new_tokens(self) -> Size:
        """Return how many tokens were written."""
        found: Size = self.at.last() - self.at.first()
        return found

    def tokens(self) -> tuple[Size, Size]:
        """Return how many tokens lie in front of the written ones, and behind them."""
        return self.at.first() - self.read.first(), self.read.last() - self.at.last()


def operands(call: Node, site: AttentionSite, ctx: PassContext) -> Operands | Refusal:
    """Match a call that is about to be rewritten, and cut its keys as its fact says."""
    if call.target is torch.ops.lipass.attend_merged.default:
        return Refusal("its history is merged")
    if site.latents_first is not None:
        return joint.whole(call)
    found: Operands | Refusal
    places = [segment.pieces or (i,) for i, segment in enumerate(site.segments)]
    if site.latent_mask:
        found = latent_mask.whole(call) or Refusal("an earlier pass has changed its mask")
    else:
        is_whole = places == [(0,)]
        found = match.attention(call, masked=site.role == "self", in_pieces=not is_whole)
        if isinstance(found, Operands):
            found = cut(found if is_whole else even(found, call, ctx), call, ctx)
    if isinstance(found, Refusal):
        return found
    if len(found.keys) != sum(map(len, places)):
        return Refusal("an earlier pass has changed what its keys are made of")
    return _in_runs(found, places, Emitter(call, ctx))


def _in_runs(given: Operands, places: list[tuple[int, ...]], emit: Emitter) -> Operands:
    """Take pieces of keys and values in another order, and join those of one segment."""
    keys, values = (
        tuple(
            pieces[run[0]] if len(run) == 1 else emit(torch.cat, [pieces[i] for i in run], 2)
            for run in places
        )
        for pieces in (given.keys, given.values)
    )
    return replace(given, keys=keys, values=values)


def cut(given: Operands, call: Node, ctx: PassContext) -> Operands:
    """Take pieces that are slices of a preallocated cache apart, where a call has written to it.

    ::

        %cache[:, :, s:e] = %k;  %key = %cache[:, :, a:e]
          %before = %cache[:, :, a:s];  keys are %before | %k

    The cache may be a `slice_scatter` or `index_copy` of another one, and positions `s:e` may be
    `arange(s, e)`. The views are inserted beside the call, which stays as it is; dead code
    elimination removes them where nobody takes the pieces. Where all that is read was written,
    the keys are what was written. In a ring that has come round what is read goes on behind it::

        %cache[:, :, s:e] = %k;  %key = %cache[:, :, :n]
          keys are %cache[:, :, :s] | %k | %cache[:, :, e:n]

    Keeps: caches that are written to again in between, or at more than one axis; reads that begin
    behind the write, or end within it.
    """
    keys: list[Node] = []
    values: list[Node] = []
    emit = Emitter(call, ctx)
    for pair in zip(given.keys, given.values, strict=True):
        filled = _both_filled(pair, call, value(given.q).shape[2])
        for i, pieces in enumerate((keys, values)):
            pieces += [pair[i]] if filled is None else _emit(filled[i], emit)
    return replace(given, keys=tuple(keys), values=tuple(values))


def even(given: Operands, call: Node, ctx: PassContext) -> Operands:
    """Cut k into slices as v is joined, or v as k is, where one of them is in one piece.

    It was joined before something else was done to it, such as positions that are turned into
    keys: `k = rope(cat([history, current]))`, `v = cat([history, current])`.
    """
    if len(given.keys) != 1 or given.mask is not None:
        return given
    k, v = match.joined(given.keys[0]), match.joined(given.values[0])
    if len(k) == len(v):
        return given
    parts = [(given.keys[0], k), (given.values[0], v)]
    if any(match.written_late(call, *part) for part in parts if len(part[1]) > 1):
        return given
    emit = Emitter(call, ctx)
    finer, whole = (v, given.keys[0]) if len(k) < len(v) else (k, given.values[0])
    slices: list[Node] = []
    start: Any = 0
    for piece in finer:
        tokens = emit.size(value(piece).shape[2], piece, 2)
        plain = isinstance(start, int) and isinstance(tokens, int)
        end: Any = start + tokens if plain else emit(operator.add, start, tokens)
        index = (slice(None), slice(None), slice(start, end))
        slices.append(emit(operator.getitem, whole, index))
        start = end
    if len(k) < len(v):
        return replace(given, keys=tuple(slices), values=v, joined_keys=True)
    return replace(given, keys=k, values=tuple(slices))


def is_cut(given: Operands, call: Node) -> bool:
    """Whether `cut` takes any piece apart."""
    pairs = zip(given.keys, given.values, strict=True)
    tokens = value(given.q).shape[2]
    return any(_both_filled(pair, call, tokens) is not None for pair in pairs)


def _both_filled(
    pair: tuple[Node, Node], call: Node, tokens: Size
) -> tuple[_Filled, _Filled] | None:
    """Return how a piece of the keys and its values are cut, if both are in the same way."""
    key, val = (_filled(piece, call) for piece in pair)
    if key is None or val is None:
        return None
    # what is written within a ring are the keys of q; anything else says nothing of what is beside
    if key.rest()[1] is not None and not known_true(key.new_tokens() == tokens):
        return None
    for one, other in zip(key.rest(), val.rest(), strict=True):
        if (one is None) != (other is None):
            return None
    same = zip(key.tokens(), val.tokens(), strict=True)
    return (key, val) if all(known_true(a == b) for a, b in same) else None


def _emit(filled: _Filled, emit: Emitter) -> list[Node]:
    read, (front, behind) = filled.read, filled.rest()
    pieces = [filled.written]
    for ends, place in ((front, 0), (behind, 2)):
        if ends is not None:
            index = [slice(None)] * read.axis + [slice(*ends)]
            pieces.insert(place, emit(operator.getitem, read.cache, tuple(index)))
    if filled.axes == tuple(range(len(filled.axes))):
        return pieces
    return [emit.method("permute", piece, *filled.axes) for piece in pieces]


def _filled(keys: Node, call: Node) -> _Filled | None:
    view = View(keys, tuple(range(value(keys).dim()))).source()
    if len(view.axes) != 4:
        return None
    read = place_read(view.node, view.axes[2])
    write = None if read is None else _last_write(read, view.node, call)
    if read is None or write is None:
        return None
    at, new, writer = write
    if at.axis != read.axis:
        return None
    # an end that is a sum of sizes and no node cannot be read from
    from_stop = isinstance(at.stop, int | Node) and guard(at.last() <= read.last())
    if not (known_true(at.last() == read.last()) or from_stop):
        return None
    # the first call of a rollout, whose ends may be symbolic, reads what it writes and no more
    begins, ends = read.first() == at.first(), at.last() == read.last()
    if known_true(ends) or (holds_now(begins) and holds_now(ends)):
        if not (known_true(begins) or guard(read.first() < at.first()) or guard(begins)):
            return None
        if known_true(begins) and not guard(ends):
            return None
    elif not guard(read.first() <= at.first()):  # a ring comes round to its first slot too
        return None
    tokens = at.last() - at.first()
    shape = value(new).shape
    expected = [tokens if i == at.axis else n for i, n in enumerate(value(read.cache).shape)]
    if len(shape) != len(expected):
        return None
    if not all(known_true(a == b) for a, b in zip(shape, expected, strict=True)):
        return None
    if value(new).dtype != value(read.cache).dtype:
        return None  # it was cast when it was written
    made = storage(value(new))
    if any(made in memory_written(n) for n in writes_between(writer, call)):
        return None
    return _Filled(read, at, new, view.axes)


def _last_write(read: Place, reader: Node, call: Node) -> tuple[Place, Node, Node] | None:
    """Return where the cache was written last, with what, and by which node."""
    earlier = [write for write in writers_of(read.cache) if write < call]
    if not earlier:
        found = scattered(read.cache)
        return None if found is None else (*found, read.cache)
    found = written(earlier[-1])
    if found is None or found[0].cache is not read.cache:
        return None
    if reader is not read.cache and earlier[-1] > reader:
        return None
    return (*found, earlier[-1])
