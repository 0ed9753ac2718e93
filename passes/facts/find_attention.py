"""Say what every attention call attends to: which keys are text, history, current; what grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch.fx import Graph, Node

from lipass.passes.attention import check_site, joint, latent_mask, match, segments, token_grid
from lipass.passes.attention.cache_pieces import cut, even
from lipass.passes.attention.cache_slots import placed
from lipass.passes.attention.evidence import evidence_of, origin, returned
from lipass.passes.attention.match import Operands, Refusal
from lipass.passes.attention.operators import places_of
from lipass.passes.attention.planted import describe_planted, other_calls
from lipass.passes.attention.prompt import is_padded_prompt
from lipass.passes.attention.site import (
    OVER_LATENTS,
    SDPA,
    AttentionSite,
    Grid,
    KeySegment,
    set_site,
    site_of,
)
from lipass.passes.attention.sources import is_cache, joined_with_others, why_not_apart
from lipass.passes.attention.token_grid import other_order
from lipass.passes.core import Numerics, Pass, PassContext, PassError
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import Size, guard, value
from lipass.passes.graph.dead_code import dropped
from lipass.passes.graph.names import call_line, call_names

ROLES = ("text", "history", "current")
_UNMASKED = ("prefill", "decode", "other")
WITH_TEXT = "its latents and what is joined with them attend to each other"
GIVEN = "given by token_grid"
_LATENTS = (token_grid.OVER_TIME, token_grid.EXCHANGED, token_grid.REORDERED)
WITHOUT_HISTORY = "its tokens attend to each other, without a history"


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
      by `Y * X`, proven or made a guard) of which there is evidence that they are latents:

      - a camera input `[B, F, 4, 4]` with `F = T_history + T_current`. Where cameras belong to
        one piece, nothing else is evidence for another; of a piece that the graph is given and one
        that it projects, the cameras belong to the first.
      - a cache: it is what a cache holds beside the tokens that the call writes to it
        (`attention/cache_pieces.py`), or is returned or written with the keys of q behind it.
      - a length that varies between calls, if the piece is an input that holds keys already, or
        part of one: only views, casts and pointwise calls lie in between. Or if the graph projects
        it from latents, as a reshape from `[.., T, Y, X, ..]` with the same `(Y, X)` shows.
    * text: any other piece whose length is no whole number of latents, or whose latents have no
      cameras where another piece's have, or that the graph projects from no latents: prompts vary
      in length too, and what is wrongly called text is attended to in full.

    Pieces of one role and one grid are one run, such as a sink and a window.

    The call is `decode` if it has history, `prefill` if not and its own keys are returned, written
    to a cache or history to a later call, otherwise `self`: all frames attend to each other, as in
    a bidirectional video model. It is `text` if q has no grid and all keys are its own, or if its
    mask is that of a padded prompt (`passes/attention/prompt.py`). It is `cross` if its keys are
    proven to come from another source: the graph makes them from inputs that the tokens of q are
    not made from, or is given them as one whole input that nobody writes to. Slices, expansions
    and scattered copies of an input may be those of a cache.

    A `self` site may have a mask that is one for all queries, such as that of padded keys; and its
    queries may hold text as well as latents (`passes/attention/joint.py`). Any site may have one
    that is proven to say which latents see which (`passes/attention/latent_mask.py`).

    Keeps (role `other`): other masks, dropout and causal attention; attention along time alone;
    operands of mixed dtypes or broadcast; k and v cut differently, or written to once they are
    joined; q without a token grid; own keys whose grid is another one; a piece that could be text
    or history: `segments` names the pieces then; guards that declared sizes (`mark_dynamic`) do
    not allow; keys of a cache that is not understood; a site that its sparse call at budget 1.0
    does not equal on small inputs.
    """

    name: ClassVar[str] = "find-attention"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    token_grid: tuple[int, ...] | None = None
    """Tokens per latent `(Y, X)`, or `(T, Y, X)` of q, where the graph does not show them."""
    segments: tuple[str, ...] = ()
    """Role of each piece of the keys, for graphs in which text and history look alike."""
    verify: bool = True
    """Compare sites with their sparse call at budget 1.0, the first of each form."""
    strict: bool = False
    """Raise where that comparison fails."""

    def __post_init__(self) -> None:
        if self.token_grid is not None and len(self.token_grid) not in (2, 3):
            raise ValueError(
                f"token_grid must be (Y, X) or (T, Y, X), got {self.token_grid}; use 8x8 or none"
            )
        if unknown := set(self.segments) - set(ROLES):
            raise ValueError(
                f"segments must be of {', '.join(ROLES)}, got {', '.join(sorted(unknown))}"
            )

    @classmethod
    def options_from(cls, options: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        verify = options.get("verify", "first") == "first"
        strict = verify and options.get("strict", False)
        return {
            "verify": verify,
            "strict": strict,
            "token_grid": options.get("sparse.token_grid"),
        }

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        describe_planted(graph, ctx)
        calls = other_calls(graph)
        names = call_names(calls)
        owners: dict[Node, Node] = {}
        compared: dict[object, str | None] = {}
        for node in ctx.visit(calls):
            refused = site_of(node)
            told = refused is not None and bool(refused.role) and not is_call(node, SDPA)
            as_q = None if told else self._joined_as_q(node)
            whole = None if told else as_q or match.attention(node, masked=True)
            with dropped(graph):
                pieces = operands = seen = whole
                if isinstance(whole, Operands):
                    pieces = as_q or even(whole, node, ctx)
                    operands = cut(pieces, node, ctx)
                    seen = operands.seen()
                name = names[node]
                site = self._joint(node, name)
                site = site or (None if told else self._by_latents(node, name, owners))
                site = site or self._describe(node, name, owners, pieces, seen)
                if site.latent_mask:
                    whole = operands = latent_mask.whole(node)
                elif isinstance(operands, Operands) and operands.mask and site.role in _UNMASKED:
                    site = replace(site, role="other", segments=(), reason="it has a mask")
                if site.latents_first is not None:
                    whole = operands = joint.whole(node)
                if isinstance(operands, Operands) and site.role in OVER_LATENTS:
                    site = placed(site, operands, node)
                    (at,) = site.segments[-1].pieces or (-1,)
                    owners[origin(operands.seen().keys[at])] = node
                    # pieces of a cache have sizes that cannot be made small, joined ones none yet
                    plain = operands == whole and not any(s.pieces for s in site.segments)
                    if plain and (why := self._wrong(node, operands, site, compared)):
                        site = replace(site, role="other", segments=(), reason=why)
            set_site(node, replace(site, operands=site.operands or places_of(node)))
            ctx.note(site.name, "found", f"{site.role}: {site.reason}")
        return False

    def _joined_as_q(self, node: Node) -> Operands | None:
        """Match a call whose keys are joined as the tokens of a grid in q are; they come whole."""
        whole = joint.joined_as_q(node)
        if whole and not isinstance(self._grid(whole.q, value(whole.q).shape[2]), Refusal):
            return whole
        return None

    def _wrong(
        self,
        node: Node,
        operands: Operands,
        site: AttentionSite,
        compared: dict[object, str | None],
    ) -> str | None:
        """Say how the site's block-sparse call at budget 1.0 differs; once for each form."""
        if not self.verify:
            return None
        form = check_site.form(node, operands, site)
        if form not in compared:
            compared[form] = check_site.wrong(node, operands, site)
        why = compared[form]
        if why and self.strict:
            raise PassError(f"strict: {site.name} must equal its sparse call at budget 1.0, {why}")
        return why and f"its sparse call at budget 1.0 is not equal: {why}"

    def _describe(
        self,
        node: Node,
        name: str,
        owners: dict[Node, Node],
        whole: Operands | Refusal | None,
        operands: Operands | Refusal | None,
    ) -> AttentionSite:
        def site(
            role: str, reason: str, grid: Grid | None = None, segments: tuple[KeySegment, ...] = ()
        ) -> AttentionSite:
            scale = operands.scale if isinstance(operands, Operands) else 1.0
            # one module makes a prefill site in one graph and a decode site in another
            full = f"{name}:{role}" if role in ("prefill", "decode") else name
            proof = ""
            if grid is not None and isinstance(operands, Operands):
                proof = self._proof(operands, q_tokens)
            return AttentionSite(full, call_line(node), role, grid, segments, scale, reason, proof)

        if operands is None or whole is None:
            refused = site_of(node)
            assert refused is not None
            return replace(refused, name=name)
        if isinstance(operands, Refusal) or isinstance(whole, Refusal):
            role = "text" if is_padded_prompt(node) else "other"
            return site(role, whole.reason if isinstance(whole, Refusal) else "")
        q_tokens: Size = value(operands.q).shape[2]
        own = [
            segments.is_current_piece(operands.q, key, q_tokens) and not is_cache(key)
            for key in operands.keys
        ]
        grid = self._grid(operands.q, q_tokens)
        if isinstance(grid, Refusal):
            is_text = all(own) and not self.token_grid and grid.reason not in _LATENTS
            return site("text" if is_text else "other", grid.reason)
        if not any(own):
            apart = (why_not_apart(operands.q, key, q_tokens) for key in operands.keys)
            if why := next(filter(None, apart), ""):
                return site("other", why)
            return site("cross", "no key is made from the tokens of q", grid)
        named = segments.named(self.segments, len(operands.keys))
        if isinstance(named, Refusal):
            return site("other", named.reason)
        known = evidence_of(operands, whole.seen(), own, grid, named, bool(self.token_grid))
        pieces: list[KeySegment] = []
        for i, key in enumerate(operands.keys):
            if own[i] and not self.token_grid and (why := other_order(operands.q, key, q_tokens)):
                return site("other", f"key piece {i} of {value(key).shape[2]}: {why}")
            found = segments.segment(key, own[i], grid, owners, known[i])
            if isinstance(found, Refusal):
                return site("other", f"key piece {i} of {value(key).shape[2]}: {found.reason}")
            pieces.append(found)
        joined = segments.runs(pieces)
        if isinstance(joined, Refusal):
            return site("other", joined.reason)
        current, runs = operands.keys[own.index(True)], tuple(joined)
        if any(piece.role == "history" for piece in runs):
            return site("decode", "it has history keys", grid, runs)
        if why := returned(current, node):
            return site("prefill", why, grid, runs)
        if why := joined_with_others(operands.q, current, q_tokens):
            return site("other", why)
        return site("self", WITHOUT_HISTORY, grid, runs)

    def _joint(self, node: Node, name: str) -> AttentionSite | None:
        """Describe attention whose queries hold text and latents, or return None."""
        told = site_of(node) is not None or self.segments
        operands = None if told else joint.whole(node)
        if not isinstance(operands, Operands):
            return None
        shown = token_grid.merge(operands.q, value(operands.q).shape[2])
        if self.token_grid is None and not isinstance(shown, Refusal):
            return None
        found = joint.describe(operands, self.token_grid)
        if isinstance(found, Refusal):
            return None
        grid, pieces, first = found
        proof = GIVEN if self.token_grid else "a reshape merges T, Y, X of the latents"
        return AttentionSite(
            name, call_line(node), "self", grid, pieces, operands.scale, WITH_TEXT, proof, first
        )

    def _by_latents(self, node: Node, name: str, owners: dict[Node, Node]) -> AttentionSite | None:
        """Describe attention over latents whose mask has rows that differ, or return None."""
        masked = latent_mask.whole(node)
        if masked is None or masked.mask is None:
            return None
        plain = replace(masked, mask=None)
        site = self._describe(node, name, owners, plain, plain)
        return latent_mask.masked(node, masked.mask, site) if site.role in OVER_LATENTS else None

    def _proof(self, operands: Operands, tokens: Size) -> str:
        found = token_grid.merge(operands.q, tokens)
        if self.token_grid is not None or isinstance(found, Refusal):
            return GIVEN
        return f"%{found.node.name} merges T, Y, X"

    def _grid(self, q: Node, tokens: Size) -> Grid | Refusal:
        if self.token_grid is None:
            return token_grid.infer(q, tokens)
        *latents, y, x = self.token_grid
        grid = (latents[0] if latents else tokens // (y * x), y, x)
        if not guard(grid[0] * y * x == tokens):
            return Refusal(f"token_grid {self.token_grid} does not give the {tokens} tokens of q")
        return grid
