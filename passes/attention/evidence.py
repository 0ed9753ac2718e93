"""Collect what is known about a piece of the keys: cameras, caches, options, later readers."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from lipass.passes.attention.cache_writes import written
from lipass.passes.attention.cameras import camera_of
from lipass.passes.attention.match import Operands
from lipass.passes.attention.products import View
from lipass.passes.attention.site import Grid
from lipass.passes.attention.sources import is_of_latents, source_of
from lipass.passes.attention.walk import same_values
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import holds_now, value
from lipass.passes.graph.writes import memory_written, storage, writers_of


@dataclass(frozen=True)
class Evidence:
    """Hold what else is known about one piece of the keys."""

    named: str | None = None
    """What the options call it."""
    camera: str = ""
    """Which input has a camera for each of its latents."""
    camera_elsewhere: bool = False
    """Whether the cameras belong to another piece."""
    cache: str = ""
    """What shows that it is from a cache of earlier calls."""
    grid_is_given: bool = False
    """Whether the options give the token grid, because the graph does not show it."""


def evidence_of(
    operands: Operands,
    whole: Operands,
    own: list[bool],
    grid: Grid,
    named: tuple[str | None, ...],
    grid_is_given: bool,
) -> list[Evidence]:
    """Collect the evidence for each piece of the keys.

    Args:
        operands: of an attention call, its caches cut.
        whole: the same as the graph has them.
        own: whether each piece is made from the tokens of q.
        grid: of q.
        named: what the options call each piece.
        grid_is_given: see `Evidence`.
    """
    keys = operands.keys
    current = next((key for key, mine in zip(keys, own, strict=True) if mine), keys[-1])
    # a ring that has not come round has nothing behind what it writes, and no cameras of that
    empty = [holds_now(value(key).shape[2] == 0) for key in keys]
    filmed = ["" if own[i] or empty[i] else camera_of(key, grid) for i, key in enumerate(keys)]
    given = [source_of(key).is_given for key in keys]
    if any(filmed[i] and given[i] for i in range(len(keys))):
        # a prompt that the graph projects may happen to have as many tokens
        filmed = [
            camera if given[i] or is_of_latents(keys[i], grid[1:]) else ""
            for i, camera in enumerate(filmed)
        ]
    found = []
    for i, key in enumerate(keys):
        elsewhere = any(filmed[:i] + filmed[i + 1 :]) and not filmed[i]
        is_old = given[i] and not own[i]
        cache = _cache_of(key, current, key not in whole.keys) if is_old else ""
        found.append(Evidence(named[i], filmed[i], elsewhere, cache, grid_is_given))
    return found


def _cache_of(key: Node, current: Node, is_cut: bool) -> str:
    """Say what shows that keys which the graph is given are those of earlier calls, or nothing.

    Args:
        key: a piece of the keys.
        current: the piece that is made from the tokens of q.
        is_cut: whether the piece is what a cache holds in front of what the call writes.
    """
    if is_cut or _in_cache_of(key, current):
        return "it is in the cache that the call writes to"
    for user in users(current):
        if is_call(user, torch.cat) and isinstance(user.args[0], (list, tuple)):
            joined = {origin(piece) for piece in user.args[0] if isinstance(piece, Node)}
            if joined == {origin(key), origin(current)} and (how := outlives(user)):
                return f"{how.replace('its keys are', 'it is')} with the keys of q behind it"
    return ""


def _in_cache_of(key: Node, current: Node) -> bool:
    """Whether keys are part of an input to which the call writes those of q, or some of them."""
    for cache in source_of(key).inputs:
        for write in writers_of(cache):
            found = written(write)
            if found is None:
                continue
            new = origin(found[1])
            while is_call(new, operator.getitem) and isinstance(new.args[0], Node):
                new = origin(new.args[0])
            if new is origin(current):
                return True
    return False


def returned(key: Node, call: Node) -> str:
    """Say how the keys of a call are used beyond it, or nothing."""
    if why := outlives(key):
        return why
    for user in users(key):
        if is_call(user, torch.cat) and user not in call.all_input_nodes:
            return "its keys are history to later calls"
    return ""


def outlives(key: Node) -> str:
    """Say how keys are kept behind the end of the graph, or nothing."""
    for user in users(key):
        if user.op == "output":
            return "its keys are returned"
        if cache := _cache_written(user):
            return f"its keys are written to %{cache.name}"
    return ""


def users(key: Node) -> Iterator[Node]:
    """Iterate over the users of keys, of copies of them and of their axes in another order."""
    key, todo = origin(key), [origin(key)]
    while todo:
        for user in todo.pop().users:
            yield user
            if origin(user) is key:
                todo.append(user)


def _cache_written(write: Node) -> Node | None:
    """Return the input that a node writes to by way of a slice or not, as caches are, if any."""
    memory = memory_written(write)
    for node in write.graph.find_nodes(op="placeholder") if memory else ():
        if storage(value(node)) in memory:
            found: Node = node
            return found
    return None


def origin(key: Node) -> Node:
    """Walk up through copies and calls that only move axes."""
    while (above := View(same_values(key), ()).source().node) is not key:
        key = above
    return key
