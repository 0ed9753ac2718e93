"""Leave out history latents that show nothing of the new view, by the cameras in the graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from lipass.passes.attention import match
from lipass.passes.attention.match import Operands
from lipass.passes.attention.site import PoseInput, poses, sites
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.emit import Emitter, refuse_training, replace_attention


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

    Keeps: graphs without one camera input; histories that are all sink and window; sites of role
    cross, text and other.
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
    tile: tuple[int, ...] = (4, 4, 4)
    """Tokens of one block along `(T, Y, X)`, where no later pass sets it."""

    @classmethod
    def options_from(cls, options: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        if not options.get("context"):
            return {}
        same = ("overlap_min", "sink_latents", "hfov_deg", "vfov_deg", "near", "far")
        window = options["context.window_chunks_max"] * options["context.chunk_latents"]
        return {name: options[f"context.{name}"] for name in same} | {"window_latents": window}

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        cameras = poses(graph)
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
        if why := next(filter(None, (refuse_training(node) for node, _ in calls)), None):
            ctx.note("context", "kept", why)
            return False
        keep = self._keep(w2c, fact, ctx)
        for node, site in calls:
            ctx.failing = node
            operands = match.attention(node)
            assert isinstance(operands, Operands)
            replace_attention(
                node,
                site,
                operands,
                ctx,
                tile=self.tile,
                budget=1.0,
                sink_latents=self.sink_latents,
                keep_frames=keep,
            )
            ctx.note(site.name, "rewritten", f"{site.role}, keys of kept latents only")
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


def _history_latents(w2c: Node, fact: PoseInput, emit: Emitter) -> int | Node:
    if isinstance(fact.history_latents, int):
        return fact.history_latents
    if node := emit.given(fact.history_latents):
        return node
    if isinstance(fact.current_latents, int):
        cameras = emit.size(value(w2c).shape[1], w2c, 1)
        return emit(operator.sub, cameras, fact.current_latents)
    return emit.size(fact.history_latents, w2c, 1)
