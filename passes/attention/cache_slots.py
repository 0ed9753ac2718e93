"""Tell where in a cache the latents of a history lie, and whether they lie in the order of time.

Attention knows no order of keys, so a model may write a chunk wherever there is room. Who chooses
latents by their cameras has to know which place holds which.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from lipass.passes.attention.cache_writes import Place, place_read, scattered, written
from lipass.passes.attention.evidence import origin, outlives, users
from lipass.passes.attention.match import Operands
from lipass.passes.attention.products import View
from lipass.passes.attention.site import AttentionSite, CacheSlots
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import guard, known_true, value
from lipass.passes.graph.writes import storage, writers_of

RING = "its cache goes on behind what the call writes, so a place may hold any latent"
IN_FRONT = "its cache grows in front, so the newest latents come first"


def placed(site: AttentionSite, operands: Operands, call: Node) -> AttentionSite:
    """Add to a decode site where its history lies in a cache that the call writes to."""
    if site.role != "decode":
        return site
    keys = operands.seen().keys
    at = {part.role: part.pieces or (i,) for i, part in enumerate(site.segments)}
    current = keys[at["current"][0]]
    if _grows_in_front(current):
        return replace(site, unordered=IN_FRONT)
    reads = [_read(keys[i]) for i in at["history"]]
    write = None if None in reads else _write(reads[0], current, call)
    if write is None:
        return site
    (cache, place), moved = write
    found = [one for one in reads if one is not None and _same_cache(one.cache, cache)]
    if len(found) != len(reads) or any(one.axis != place.axis for one in found):
        return site
    slots = CacheSlots(
        value(cache).shape[place.axis],
        tuple((one.first(), one.last()) for one in found),
        place.first(),
        moved,
    )
    return replace(site, slots=slots, unordered="" if _in_order(found, place) else RING)


def _read(key: Node) -> Place | None:
    view = View(key, tuple(range(value(key).dim()))).source()
    return place_read(view.node, view.axes[2]) if len(view.axes) == 4 else None


def _write(
    read: Place | None, current: Node, call: Node
) -> tuple[tuple[Node, Place], bool] | None:
    """Return the cache, where the call writes the keys of q to it, and whether it moves others."""
    assert read is not None
    earlier = [node for node in writers_of(read.cache) if node < call]
    found = written(earlier[-1]) if earlier else scattered(read.cache)
    if found is None or origin(found[1]) is not origin(current):
        return None
    if earlier:
        return (read.cache, found[0]), len(earlier) > 1
    above: Any = origin(read.cache).all_input_nodes[0]
    return (read.cache, found[0]), origin(above).op != "placeholder"


def _same_cache(one: Node, other: Node) -> bool:
    at = storage(value(one))
    return at is not None and at == storage(value(other))


def _in_order(reads: list[Place], write: Place) -> bool:
    """Whether pieces come one behind the other, and all in front of what is written."""
    for before, behind in itertools.pairwise(reads):
        if known_true(before.last() > behind.first()):
            return False
    for read in reads:
        if known_true(read.first() >= write.last()):
            return False
        if not guard(read.last() <= write.first()):
            return False
    return True


def _grows_in_front(current: Node) -> bool:
    """Whether the keys of q are kept in front of what was there before."""
    for user in users(current):
        if is_call(user, torch.cat) and isinstance(user.args[0], (list, tuple)):
            first: Any = user.args[0][0]
            is_first = isinstance(first, Node) and origin(first) is origin(current)
            if is_first and len(user.args[0]) > 1 and outlives(user):
                return True
    return False
