"""Leave out history latents that show nothing of the new view, by the cameras in the graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from lipass.passes.attention import cache_pieces, match
from lipass.passes.attention.evidence import outlives
from lipass.passes.attention.latent_mask import BY_LATENTS
from lipass.passes.attention.match import Refusal
from lipass.passes.attention.site import AttentionSite, PoseInput, poses, sites
from lipass.passes.attention.sparse_call import SparseCall, replace_attention
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.compat import guard, known_true, value
from lipass.passes.graph.emit import Emitter, refuse_grid, refuse_rewrite
from lipass.passes.graph.ops import name_of


@dataclass(frozen=True)
class PruneContext(Pass):
    """Compute which history latents to keep, once a graph, and tell every attention over them.

    ::

        %o = scaled_dot_product_attention(%q, %key, %value)

        %memory = %w2c[:, :n];  %query = %w2c[:, n:]
        %overlap: f32[1, n] = lipass.view_overlap(%query, %memory, 60.0, 35.0, 0.5, 8.0)
        %keep: b8[1, n] = (%overlap >= 0.3) | (frame < sink) | (frame >= n - window)
        %o = lipass.sparse_attention(%q, [..], [..], .., budget 1.0, .., %keep, 'blocks.0.attn')

    With `sparse-attention` behind it the budget is replaced there; without, every kept block is
    visited. Prefill leaves out the same latents, as keys.

    A graph without cameras asks the session, at each decode site; without one nothing is dropped::

        %keep: b8[1, n] = lipass.chosen_latents(%history_keys, 24)
        %o = lipass.sparse_attention(%q, [..], [..], .., budget 1.0, .., %keep, 'blocks.0.attn')

    So does one whose history may not lie in the order of its cameras, such as a ring.

    Keeps: graphs with several camera inputs; histories that are all sink and window; sites of role
    cross, text and other; prefill whose keys outlive the call, unless `prefill_each_chunk` says
    that they die with the chunk: what is left out for one view may be what the next one shows.
    """

    name: ClassVar[str] = "prune-context"
    numerics: ClassVar[Numerics] = Numerics.APPROX
    requires: ClassVar[tuple[str, ...]] = ("find-attention", "find-poses")
    precedes: ClassVar[tuple[str, ...]] = ("sparse-attention", "guard-steps")
    section: ClassVar[str | None] = "context"
    rewrites_attention: ClassVar[bool] = True
    leaves_out: ClassVar[bool] = True
    in_dense_twin: ClassVar[bool] = False

    overlap_min: float = 0.3
    """Latents that show less than this share of the new view are left out."""
    sink_latents: int = 1
    """Leading latents that always stay."""
    window_latents: int = 12
    """Trailing history latents that always stay."""
    hfov_deg: float = 60.0
    vfov_deg: float = 35.0
    near: float = 0.5
    far: float = 8.0
    prefill_each_chunk: bool = False
    """Whether a cache that prefill returns or writes is filled anew for each chunk."""
    tile: tuple[int, ...] = (4, 4, 4)
    """Tokens of one block along `(T, Y, X)`, where no later pass sets it."""

    @classmethod
    def options_from(cls, options: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        if not options.get("context"):
            return {}
        same = ("overlap_min", "sink_latents", "hfov_deg", "vfov_deg", "near", "far")
        window = options["context.window_latents"]
        if window is None:
            window = options["context.window_chunks_max"] * options["context.chunk_latents"]
        return {name: options[f"context.{name}"] for name in same} | {"window_latents": window}

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        cameras = poses(graph)
        mixed = next(filter(None, (site.unordered for _, site in sites(graph))), "")
        if cameras and mixed:
            ctx.note("context", "kept", f"the cameras of the graph do not choose: {mixed}")
        if not cameras or mixed:
            return self._ask(graph, ctx)
        if len(cameras) != 1:
            ctx.note(
                "context", "kept", f"the graph has {len(cameras)} camera inputs, one is needed"
            )
            return False
        w2c, fact = cameras[0]
        if known_true(fact.history_latents <= self.sink_latents + self.window_latents):
            always = f"sink {self.sink_latents} and window {self.window_latents}"
            ctx.note("context", "kept", f"all {fact.history_latents} latents are {always}")
            return False
        calls = [(n, s) for n, s in sites(graph) if s.role in ("prefill", "decode")]
        if not calls:
            ctx.note("context", "kept", "the graph has no prefill or decode site")
            return False
        refused = (refuse_rewrite(node) or refuse_grid(site) for node, site in calls)
        if why := next(filter(None, refused), None):
            ctx.note("context", "kept", why)
            return False
        calls = self._without_caches(calls, ctx)
        keep = self._keep(w2c, fact, ctx) if calls else None
        for node, site in calls:
            ctx.failing = node
            if not self._rewrite(node, site, w2c, keep, ctx):
                continue
            ctx.note(site.name, "rewritten", f"{site.role}, keys of kept latents only")
        return bool(calls)

    def _ask(self, graph: Graph, ctx: PassContext) -> bool:
        """Let a session choose among the latents of each history, where the graph cannot."""
        calls = [(node, site) for node, site in sites(graph) if site.role == "decode"]
        if not calls:
            ctx.note("context", "kept", "the graph has no cameras and no decode site")
            return False
        changed = False
        for node, site in calls:
            ctx.failing = node
            if why := self._ask_at(node, site, ctx):
                ctx.note(site.name, "kept", why)
                continue
            changed = True
            ctx.note(site.name, "rewritten", "decode, keys of latents that a session chooses")
        return changed

    def _ask_at(self, node: Node, site: AttentionSite, ctx: PassContext) -> str | None:
        """Let one site ask; say why it cannot."""
        if SparseCall.is_one(node):
            return "lipass.attend asks the session itself"
        if why := refuse_rewrite(node) or refuse_grid(site) or _by_latents(site):
            return why
        operands = cache_pieces.operands(node, site, ctx)
        if isinstance(operands, Refusal):
            return operands.reason
        roles = [segment.role for segment in site.segments]
        assert site.q_grid is not None
        per_latent = int(site.q_grid[1]) * int(site.q_grid[2])
        emit, keys = Emitter(node, ctx), operands.keys[roles.index("history")]
        keep = emit(torch.ops.lipass.chosen_latents.default, keys, per_latent)
        batch = emit.size(value(operands.q).shape[0], operands.q, 0)
        mask = emit.method("expand", keep, batch, -1)
        replace_attention(
            node,
            site,
            operands,
            ctx,
            tile=self.tile,
            budget=1.0,
            sink_latents=self.sink_latents,
            keep_frames=mask,
        )
        return None

    def _without_caches(
        self, calls: list[tuple[Node, AttentionSite]], ctx: PassContext
    ) -> list[tuple[Node, AttentionSite]]:
        """Leave out prefill if any of its keys outlive the call; each layer feeds the next."""
        prefill = [(node, site) for node, site in calls if site.role == "prefill"]
        why = "" if self.prefill_each_chunk else next(filter(None, map(_outlive, prefill)), "")
        if not why:
            return calls
        for _, site in prefill:
            told = "say prefill_each_chunk if they are computed anew for each chunk"
            ctx.note(
                site.name, "kept", f"keys of dropped latents would be wrong later: {why}; {told}"
            )
        return [call for call in calls if call not in prefill]

    def _rewrite(
        self, node: Node, site: AttentionSite, w2c: Node, keep: Node | None, ctx: PassContext
    ) -> bool:
        planted = SparseCall.is_one(node)
        if why := _by_latents(site):
            ctx.note(site.name, "kept", why)
            return False
        operands = None if planted else cache_pieces.operands(node, site, ctx)
        if isinstance(operands, Refusal):
            ctx.note(site.name, "kept", operands.reason)
            return False
        q = SparseCall.of(node).q if operands is None else operands.q
        mask = _for_batch(keep, q, Emitter(node, ctx)) if keep else None
        if mask is None:
            views, batch = value(w2c).shape[0], value(q).shape[0]
            ctx.note(site.name, "kept", f"{views} sets of cameras for a batch of {batch}")
            return False
        if operands is None:
            call = replace(SparseCall.of(node), tile=self.tile, sink_latents=self.sink_latents)
            replace(call, budget=1.0, keep_frames=mask).write(node)
            return True
        replace_attention(
            node,
            site,
            operands,
            ctx,
            tile=self.tile,
            budget=1.0,
            sink_latents=self.sink_latents,
            keep_frames=mask,
        )
        return True

    def _keep(self, w2c: Node, fact: PoseInput, ctx: PassContext) -> Node:
        """Insert the mask `[B, T]` behind the inputs, outside of all modules and steps."""
        first = next(node for node in w2c.graph.nodes if node.op != "placeholder")
        emit = Emitter(first, ctx, inside=False)
        latents = _history_latents(w2c, fact, emit)
        memory = emit(operator.getitem, w2c, (slice(None), slice(None, latents)))
        query = emit(operator.getitem, w2c, (slice(None), slice(latents, None)))
        lens = (self.hfov_deg, self.vfov_deg, self.near, self.far)
        overlap = emit(torch.ops.lipass.view_overlap.default, query, memory, *lens)
        frame = emit(torch.arange, latents, device=value(w2c).device)
        recent = emit(operator.ge, frame, self._first_recent(latents, emit))
        sink = emit(operator.lt, frame, self.sink_latents)
        seen = emit(operator.ge, overlap, self.overlap_min)
        return emit(operator.or_, seen, emit(operator.or_, recent, sink))

    def _first_recent(self, latents: int | Node, emit: Emitter) -> int | Node:
        if isinstance(latents, int):
            return latents - self.window_latents
        return emit(operator.sub, latents, self.window_latents)


def _for_batch(keep: Node, q: Node, emit: Emitter) -> Node | None:
    """Return the mask for each sample of q; streams stacked on the batch share their cameras."""
    views, batch = value(keep).shape[0], value(q).shape[0]
    if known_true(views == 1) and not known_true(batch == 1):
        return emit.method("expand", keep, emit.size(batch, q, 0), -1)
    return keep if guard(views == batch) else None


def _by_latents(site: AttentionSite) -> str:
    return BY_LATENTS if site.latent_mask else ""


def _outlive(call: tuple[Node, AttentionSite]) -> str:
    """Say how the keys of latents are kept behind the end of the graph, or nothing."""
    node, site = call
    if SparseCall.is_one(node):
        planted = SparseCall.of(node)
        keys, values = planted.k, planted.v
    else:
        operands = match.attention(node)
        if isinstance(operands, Refusal):
            return ""
        keys, values = operands.keys, operands.values
    places = [segment.pieces or (i,) for i, segment in enumerate(site.segments)]
    own = [at for at, segment in zip(places, site.segments, strict=True) if segment.role != "text"]
    if sum(map(len, places)) != len(keys):
        own = [tuple(range(len(keys)))]  # they have been joined since
    made = [_with_own_heads(x) for run in own for at in run for x in (keys[at], values[at])]
    return next(filter(None, map(outlives, made)), "")


def _with_own_heads(key: Node) -> Node:
    """Return keys before `lipass.attend` has repeated their heads for those of q."""
    return key.all_input_nodes[0] if name_of(key) == "repeat_interleave" else key


def _history_latents(w2c: Node, fact: PoseInput, emit: Emitter) -> int | Node:
    if isinstance(fact.history_latents, int):
        return fact.history_latents
    if node := emit.given(fact.history_latents):
        return node
    if isinstance(fact.current_latents, int):
        cameras = emit.size(value(w2c).shape[1], w2c, 1)
        return emit(operator.sub, cameras, fact.current_latents)
    return emit.size(fact.history_latents, w2c, 1)
