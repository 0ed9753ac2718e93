"""Decide which role a piece of the keys has, by written rules (see `FindAttention`)."""

from __future__ import annotations

from torch.fx import Node

from lipass.passes.attention.evidence import Evidence, origin
from lipass.passes.attention.match import Refusal
from lipass.passes.attention.site import Grid, KeySegment, site_of
from lipass.passes.attention.sources import is_of_latents, source_of
from lipass.passes.attention.walk import shares_tokens
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

VARIES = "its length varies between calls"
NAME_THEM = (
    'name the pieces in their order with the option "find-attention.segments", such as '
    '("history", "current") or ("text", "history", "current")'
)


def is_current_piece(q: Node, key: Node, q_tokens: Size) -> bool:
    """Whether keys are made from the tokens that q is made from."""
    return known_true(value(key).shape[2] == q_tokens) and shares_tokens(q, key, q_tokens)


def runs(pieces: list[KeySegment]) -> list[KeySegment] | Refusal:
    """Join pieces of one role and put text first, history next: attention knows no order of keys.

    Two pieces that vary in length, and of which nothing else is known, may be a prompt and a
    history.
    """
    places = {
        role: tuple(i for i, piece in enumerate(pieces) if piece.role == role)
        for role in ("text", "history", "current")
    }
    shown = " | ".join(piece.role for piece in pieces)
    histories = [pieces[i] for i in places["history"]]
    varying = [piece for piece in histories if piece.why == VARIES]
    if len(varying) > 1 or not all(_same_grid(histories[0], piece) for piece in histories):
        return Refusal(f"keys are {shown}; {NAME_THEM}")
    if len(places["current"]) != 1:
        return Refusal(f"keys are {shown}; those of q must be there once")
    order = [i for part in places.values() for i in part]
    if order == list(range(len(pieces))) and len(order) == sum(map(bool, places.values())):
        return pieces
    return [_joined([pieces[i] for i in part], part) for part in places.values() if part]


def _joined(parts: list[KeySegment], places: tuple[int, ...]) -> KeySegment:
    tokens, latents = parts[0].tokens, parts[0].grid[0]
    for part in parts[1:]:
        tokens, latents = tokens + part.tokens, latents + part.grid[0]
    is_text = parts[0].role == "text"
    grid = (1, 1, tokens) if is_text else (latents, *parts[0].grid[1:])
    why = "; ".join(dict.fromkeys(part.why for part in parts))
    return KeySegment(parts[0].role, tokens, grid, why, places)


def _same_grid(one: KeySegment, other: KeySegment) -> bool:
    sizes = zip(one.grid[1:], other.grid[1:], strict=True)
    return all(known_true(a == b) for a, b in sizes)


def named(given: tuple[str, ...], pieces: int) -> tuple[str | None, ...] | Refusal:
    """Return what options call each of so many pieces; history may be absent, as in prefill."""
    without = tuple(role for role in given if role != "history")
    for roles in (given or (None,) * pieces, without):
        if len(roles) == pieces:
            return roles
    return Refusal(f"segments names {len(given)} pieces, the keys have {pieces}")


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
            why = VARIES
    if not why:
        return Refusal(f"it could be text or {latents} latents; {NAME_THEM}")
    if not guard(is_whole):
        declared = why_no_guard(is_whole)
        why = f"its length is not proven to be whole latents of {per_latent}"
        return Refusal(f"{why}: {declared}" if declared else why)
    return KeySegment("history", tokens, (latents, q_grid[1], q_grid[2]), why)
