"""Say what every attention call attends to: which keys are text, history, current; what grid."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from lipass.passes import match, token_grid
from lipass.passes.compat import Size, divides, guard, holds_now, is_symbolic, known_true, value
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.match import SDPA, Operands, Refusal
from lipass.passes.site import (
    AttentionSite,
    Grid,
    Segment,
    call_line,
    module_path,
    set_site,
    site_of,
)

ROLES = ("text", "history", "current")

_NAME_THEM = "name the pieces with find-attention{segments=text+history+current}"


@dataclass(frozen=True)
class FindAttention(Pass):
    """Attach an `AttentionSite` to every attention call; rewrite nothing.

    ::

        %key = cat([%l_text_kv_0_0_, %l_history_0_0_, %k], 2)
        %o = scaled_dot_product_attention(%q, %key, %value)
          decode, q (4, 8, 8), keys text (1, 1, 32) | history (n, 8, 8) | current (4, 8, 8)

    The rules, per piece of a concatenated key:

    * current: as many tokens as q, and computed from a tensor of that many tokens that q is
      computed from too, no attention in between.
    * history: the current piece of an earlier attention call; or whole latents (its length divides
      by `Y * X`, proven or made a guard) of which there is evidence that they are latents: a
      length that varies between calls, or a camera input `[B, F, 4, 4]` with
      `F = T_history + T_current`. Where cameras belong to one piece, a length that varies is no
      evidence for another.
    * text: any other piece whose length is no whole number of latents, or whose latents have no
      cameras where another piece's have.

    The call is `decode` if it has history, `prefill` if not and its own keys are returned or are
    history to a later call, `cross` if no key is current, `text` if q has no grid and all keys are
    its own.

    Keeps (role `other`): masks, dropout, causal and grouped attention; operands of mixed dtypes or
    broadcast; k and v cut differently, or written to once they are joined; q without a token grid;
    a piece that could be text or history: `segments` names the pieces then.
    """

    name: ClassVar[str] = "find-attention"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    token_grid: tuple[int, ...] | None = None
    """Tokens per latent `(Y, X)`, or `(T, Y, X)` of q, where the graph does not show them."""
    segments: tuple[str, ...] = ()
    """Role of each piece of the keys, for graphs in which text and history look alike."""

    def __post_init__(self) -> None:
        if self.token_grid is not None and len(self.token_grid) not in (2, 3):
            raise ValueError(
                f"token_grid must be (Y, X) or (T, Y, X), got {self.token_grid}; use 8x8 or none"
            )
        if unknown := set(self.segments) - set(ROLES):
            raise ValueError(
                f"segments must be of {', '.join(ROLES)}, got {', '.join(sorted(unknown))}"
            )

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        calls = [node for node in graph.nodes if match.is_call(node, SDPA)]
        names = _names(calls)
        owners: dict[Node, Node] = {}
        for node in ctx.visit(calls):
            site = self._describe(node, names[node], owners)
            set_site(node, site)
            if site.role in ("prefill", "decode"):
                operands = match.attention(node)
                assert isinstance(operands, Operands)
                owners[match.same_values(operands.keys[-1])] = node
            ctx.note(site.name, "found", f"{site.role}: {site.reason}")
        return False

    def _describe(self, node: Node, name: str, owners: dict[Node, Node]) -> AttentionSite:
        def site(
            role: str, reason: str, grid: Grid | None = None, segments: tuple[Segment, ...] = ()
        ) -> AttentionSite:
            scale = operands.scale if isinstance(operands, Operands) else 1.0
            # one module makes a prefill site in one graph and a decode site in another
            full = f"{name}:{role}" if role in ("prefill", "decode") else name
            return AttentionSite(full, call_line(node), role, grid, segments, scale, reason)

        operands = match.attention(node)
        if isinstance(operands, Refusal):
            return site("other", operands.reason)
        q_tokens: Size = value(operands.q).shape[2]
        own = [_is_current(operands.q, key, q_tokens) for key in operands.keys]
        grid = self._grid(operands.q, q_tokens)
        if isinstance(grid, Refusal):
            return site("text" if all(own) and not self.token_grid else "other", grid.reason)
        if not any(own):
            return site("cross", "no key is made from the tokens of q", grid)
        named = self._named(len(operands.keys))
        if isinstance(named, Refusal):
            return site("other", named.reason)
        filmed = [_camera(key, grid) for key in operands.keys]
        segments: list[Segment] = []
        for i, key in enumerate(operands.keys):
            camera = filmed[i] if not own[i] else ""
            elsewhere = any(filmed[:i] + filmed[i + 1 :]) and not camera
            found = _segment(key, own[i], grid, owners, named[i], camera, elsewhere)
            if isinstance(found, Refusal):
                return site("other", f"key piece {i} of {value(key).shape[2]}: {found.reason}")
            segments.append(found)
        roles = [segment.role for segment in segments]
        if roles.count("history") > 1:
            return site("other", f"keys are {' | '.join(roles)}; {_NAME_THEM}")
        if roles.count("current") != 1 or roles[-1] != "current":
            return site("other", f"keys are {' | '.join(roles)}; the last must be current, once")
        if "history" in roles:
            return site("decode", "it has history keys", grid, tuple(segments))
        if why := _returned(operands.keys[-1], node):
            return site("prefill", why, grid, tuple(segments))
        return site("other", "it has no history keys and its own keys are used nowhere else")

    def _named(self, pieces: int) -> tuple[str | None, ...] | Refusal:
        """Return what `segments` calls each piece; history may be absent, as it is in prefill."""
        without = tuple(role for role in self.segments if role != "history")
        for named in ((None,) * pieces if not self.segments else self.segments, without):
            if len(named) == pieces:
                return named
        return Refusal(f"segments names {len(self.segments)} pieces, the keys have {pieces}")

    def _grid(self, q: Node, tokens: Size) -> Grid | Refusal:
        if self.token_grid is None:
            return token_grid.infer(q, tokens)
        *latents, y, x = self.token_grid
        grid = (latents[0] if latents else tokens // (y * x), y, x)
        if not guard(grid[0] * y * x == tokens):
            return Refusal(f"token_grid {self.token_grid} does not give the {tokens} tokens of q")
        return grid


def _names(calls: list[Node]) -> dict[Node, str]:
    """Name each call by its module path; several calls in one module count `#1`, `#2`, ..."""
    paths = {node: _path(node) for node in calls}
    total, seen, names = Counter(paths.values()), Counter[str](), {}
    for node, path in paths.items():
        seen[path] += 1
        names[node] = f"{path}#{seen[path]}" if total[path] > 1 else path
    return names


def _path(node: Node) -> str:
    path = module_path(node)
    return path if path and not path.startswith("@") else f"attention{path}"


def _is_current(q: Node, key: Node, q_tokens: Size) -> bool:
    return known_true(value(key).shape[2] == q_tokens) and match.shares_tokens(q, key, q_tokens)


def _segment(
    key: Node,
    is_current: bool,
    q_grid: Grid,
    owners: dict[Node, Node],
    named: str | None,
    camera: str,
    camera_elsewhere: bool,
) -> Segment | Refusal:
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
        return Segment("current", tokens, q_grid, "made from the tokens of q")
    if named == "current":
        return Refusal("segments calls it current, but it is not made from the tokens of q")
    if named == "text":
        return Segment("text", tokens, text, "named in segments")
    owner = owners.get(match.same_values(key))
    if owner is not None and (site := site_of(owner)) and site.q_grid:
        return Segment("history", tokens, site.q_grid, f"keys of {site.name}")
    is_whole = divides(per_latent, tokens)
    if not holds_now(is_whole):
        if named == "history":
            return Refusal(f"history must be whole latents of {per_latent} tokens")
        return Segment("text", tokens, text, f"no whole number of latents of {per_latent}")
    varies = "its length varies between calls" if is_symbolic(tokens) else ""
    why = (named and "named in segments") or camera or varies
    if camera_elsewhere and not named:
        return Segment("text", tokens, text, "the cameras belong to another piece")
    if not why:
        return Refusal(f"it could be text or {latents} latents; {_NAME_THEM}")
    if not guard(is_whole):
        return Refusal(f"its length is not proven to be whole latents of {per_latent}")
    return Segment("history", tokens, (latents, q_grid[1], q_grid[2]), why)


def _camera(key: Node, q_grid: Grid) -> str:
    """Name the input that has a camera for each latent of a piece and of q, or nothing."""
    tokens: Size = value(key).shape[2]
    per_latent = q_grid[1] * q_grid[2]
    if not holds_now(divides(per_latent, tokens)):
        return ""
    cameras = tokens // per_latent + q_grid[0]
    for node in key.graph.find_nodes(op="placeholder"):
        if match.is_matrices(node) and holds_now(value(node).shape[1] == cameras):
            return f"{node.name} has a camera for each of its latents"
    return ""


def _returned(key: Node, call: Node) -> str:
    """Say how the keys of a call are used beyond it, or nothing."""
    key, todo = match.same_values(key), [match.same_values(key)]
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return "its keys are returned"
            if match.is_call(user, torch.cat) and user not in call.all_input_nodes:
                return "its keys are history to later calls"
            if user.op == "call_method" and match.same_values(user) is key:
                todo.append(user)
    return ""
