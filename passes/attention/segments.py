"""Decide which role a piece of the keys has, by written rules (see `FindAttention`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from lipass.passes.attention.match import Refusal
from lipass.passes.attention.products import View
from lipass.passes.attention.site import Grid, KeySegment, site_of
from lipass.passes.attention.sources import is_of_latents, source_of
from lipass.passes.attention.walk import same_values, shares_tokens
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import (
    Size,
    divides,
    guard,
    holds_now,
    is_symbolic,
    known_true,
    value,
    why_no_guard,
)
from lipass.passes.graph.writes import memory_written, storage

NAME_THEM = "name the pieces with find-attention{segments=text+history+current}"


def is_current_piece(q: Node, key: Node, q_tokens: Size) -> bool:
    """Whether keys are made from the tokens that q is made from."""
    return known_true(value(key).shape[2] == q_tokens) and shares_tokens(q, key, q_tokens)


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
    """Which cache held it in front of what the call writes."""
    grid_is_given: bool = False
    """Whether the options give the token grid, because the graph does not show it."""


def segment(
    key: Node,
    is_current: bool,
    q_grid: Grid,
    owners: dict[Node, Node],
    known: Evidence,
) -> KeySegment | Refusal:
    """Decide the role of one piece of the keys."""
    tokens: Size = value(key).shape[2]
    latents, per_latent = tokens // (q_grid[1] * q_grid[2]), q_grid[1] * q_grid[2]
    text, named = (1, 1, tokens), known.named
    if is_current:
        if named not in (None, "current"):
            return Refusal(f"it is made from the tokens of q, but segments calls it {named}")
        return KeySegment("current", tokens, q_grid, "made from the tokens of q")
    if named == "current":
        return Refusal("segments calls it current, but it is not made from the tokens of q")
    if named == "text":
        return KeySegment("text", tokens, text, "named in segments")
    owner = owners.get(origin(key))
    if owner is not None and (site := site_of(owner)) and site.q_grid:
        return KeySegment("history", tokens, site.q_grid, f"keys of {site.name}")
    is_whole = divides(per_latent, tokens)
    if not holds_now(is_whole):
        if named == "history" or known.cache:
            return Refusal(f"history must be whole latents of {per_latent} tokens")
        return KeySegment("text", tokens, text, f"no whole number of latents of {per_latent}")
    why = (named and "named in segments") or known.camera or known.cache
    if known.camera_elsewhere and not named:
        return KeySegment("text", tokens, text, "the cameras belong to another piece")
    if not why:
        source = source_of(key)
        of_latents = is_of_latents(key, (q_grid[1], q_grid[2]))
        if source.made_by is not None and not of_latents and not known.grid_is_given:
            made = f"%{source.made_by.name} makes it, and from no latents"
            return KeySegment("text", tokens, text, made)
        if is_symbolic(tokens) and (source.is_given or of_latents):
            why = "its length varies between calls"
    if not why:
        return Refusal(f"it could be text or {latents} latents; {NAME_THEM}")
    if not guard(is_whole):
        declared = why_no_guard(is_whole)
        why = f"its length is not proven to be whole latents of {per_latent}"
        return Refusal(f"{why}: {declared}" if declared else why)
    return KeySegment("history", tokens, (latents, q_grid[1], q_grid[2]), why)


def returned(key: Node, call: Node) -> str:
    """Say how the keys of a call are used beyond it, or nothing."""
    if why := outlives(key):
        return why
    for user in _users(key):
        if is_call(user, torch.cat) and user not in call.all_input_nodes:
            return "its keys are history to later calls"
    return ""


def outlives(key: Node) -> str:
    """Say how keys are kept behind the end of the graph, or nothing."""
    for user in _users(key):
        if user.op == "output":
            return "its keys are returned"
        if cache := _cache_written(user):
            return f"its keys are written to %{cache.name}"
    return ""


def _users(key: Node) -> Iterator[Node]:
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
