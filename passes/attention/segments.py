"""Decide which role a piece of the keys has, by written rules (see `FindAttention`)."""

from __future__ import annotations

import torch
from torch.fx import Node

from lipass.passes.attention.match import Refusal
from lipass.passes.attention.products import View
from lipass.passes.attention.site import Grid, KeySegment, site_of
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
)

NAME_THEM = "name the pieces with find-attention{segments=text+history+current}"


def is_current_piece(q: Node, key: Node, q_tokens: Size) -> bool:
    """Whether keys are made from the tokens that q is made from."""
    return known_true(value(key).shape[2] == q_tokens) and shares_tokens(q, key, q_tokens)


def segment(
    key: Node,
    is_current: bool,
    q_grid: Grid,
    owners: dict[Node, Node],
    named: str | None,
    camera: str,
    camera_elsewhere: bool,
) -> KeySegment | Refusal:
    """Decide the role of one piece of the keys.

    `named` is what the options say, `camera` the evidence that cameras give for this piece, and
    `camera_elsewhere` that they belong to another one.
    """
    tokens: Size = value(key).shape[2]
    latents, per_latent = tokens // (q_grid[1] * q_grid[2]), q_grid[1] * q_grid[2]
    text = (1, 1, tokens)
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
        if named == "history":
            return Refusal(f"history must be whole latents of {per_latent} tokens")
        return KeySegment("text", tokens, text, f"no whole number of latents of {per_latent}")
    varies = "its length varies between calls" if is_symbolic(tokens) else ""
    why = (named and "named in segments") or camera or varies
    if camera_elsewhere and not named:
        return KeySegment("text", tokens, text, "the cameras belong to another piece")
    if not why:
        return Refusal(f"it could be text or {latents} latents; {NAME_THEM}")
    if not guard(is_whole):
        return Refusal(f"its length is not proven to be whole latents of {per_latent}")
    return KeySegment("history", tokens, (latents, q_grid[1], q_grid[2]), why)


def returned(key: Node, call: Node) -> str:
    """Say how the keys of a call are used beyond it, or nothing."""
    key, todo = origin(key), [origin(key)]
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return "its keys are returned"
            if is_call(user, torch.cat) and user not in call.all_input_nodes:
                return "its keys are history to later calls"
            if origin(user) is key:
                todo.append(user)
    return ""


def origin(key: Node) -> Node:
    """Walk up through copies and calls that only move axes."""
    while (above := View(same_values(key), ()).source().node) is not key:
        key = above
    return key
