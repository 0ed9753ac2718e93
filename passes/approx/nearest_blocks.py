"""Sort the keys of a history by direction, so that a block holds keys that are chosen together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

# The import registers operators that the pass has to know.
import lipass.kernels.nearest.order  # noqa: F401
from lipass.kernels.nearest.order import check_axes
from lipass.passes.attention.site import AttentionSite, sites
from lipass.passes.attention.sparse_call import SparseCall
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.compat import value
from lipass.passes.graph.emit import Emitter, emit_behind
from lipass.passes.graph.writes import memory_written, storage

CHOICES = ("means", "buckets")
Sorted = tuple[Node, Node, Node]
"""Basis, order and means of a history."""


@dataclass(frozen=True)
class NearestBlocks(Pass):
    """Sort history keys and queries into buckets of like direction; blocks are runs of that order.

    ::

        %o = lipass.sparse_attention(%q, [%hist_k, %k], .., 'decode', None, 'blocks.0.attn')

        %basis = lipass.key_basis(%hist_k, 8, 0, 64)
        %order = lipass.key_order(%hist_k, %basis, 64, 64)
        %means = lipass.pool_in_order(%hist_k, %order, 64)
        %o = lipass.sparse_attention(%q, [%hist_k, %k], .., history_means = %means,
               planner = 'buckets', history_order = %order, history_basis = %basis)

    Keys are halved again and again across the axis along which they differ most, until a part is
    one block; queries along the same axes, weighted by what they do to scores. The budget says how
    many blocks are visited, the best by their means; one that leaves nothing out is dense.

    What follows from the keys alone stands in calls of its own: in front of an unrolled loop, or
    kept by an open session (`hoist-calls`), so it is made once a chunk. Keys are not moved; the
    kernel reads them in the order. Queries are sorted and blocks chosen in each step. Latents that
    cameras leave out, or the session, leave the order too.

    Keeps: everything where `choose` is not `buckets`; sites without a history; masks over latents
    and blocks of a caller, which say themselves what is visited; keys that are written to, as in
    a ring, whose order would have to be made in each step.
    """

    name: ClassVar[str] = "nearest-blocks"
    numerics: ClassVar[Numerics] = Numerics.APPROX
    requires: ClassVar[tuple[str, ...]] = ("sparse-attention",)
    precedes: ClassVar[tuple[str, ...]] = ("pool-history", "guard-steps", "hoist-calls")
    section: ClassVar[str | None] = "sparse"
    in_dense_twin: ClassVar[bool] = False

    choose: str = "means"
    """What a block of a history holds: `means` of tokens that lie together, or `buckets`."""
    axes: int = 8
    """Main directions of the keys of a head that they may be cut along."""
    query_block: int = 32
    """Queries that choose together, at most; a tile of queries is halved to that."""
    seed: int = 0
    """That of the numbers which the search for directions starts from."""

    def __post_init__(self) -> None:
        if self.choose not in CHOICES:
            raise ValueError(
                f"choose must be one of {', '.join(CHOICES)}, got {self.choose!r}; use 'means'"
            )
        check_axes(self.axes)
        if self.query_block < 1:
            raise ValueError(f"query_block must be >= 1, got {self.query_block}; use 32")

    @classmethod
    def options_from(cls, options: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        return {"choose": options["sparse.choose"]} if options.get("sparse") else {}

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        if self.choose != "buckets":
            return False
        written = {at for node in graph.nodes for at in memory_written(node)}
        found: dict[tuple[Node, tuple[int, ...]], Sorted] = {}
        rewritten = 0
        kept: dict[str, int] = {}
        for node, site in sites(graph):
            call = SparseCall.of(node) if SparseCall.is_one(node) else None
            if call is None or call.history is None:
                continue
            ctx.failing = node
            if why := _refusal(call, call.history, written):
                kept[why] = kept.get(why, 0) + 1
                continue
            asked = call.history, call.tile[:3]
            if asked not in found:
                found[asked] = self._sorted(call, site, ctx)
            basis, order, means = found[asked]
            replace(
                call,
                tile=(*call.tile[:3], *self._query_tile(call.tile[-3:])),
                history_means=means,
                planner="buckets",
                history_order=order,
                history_basis=basis,
            ).write(node)
            rewritten += 1
        ctx.failing = None
        for why, count in kept.items():
            ctx.note("history", "kept", f"{_count(count)}: {why}")
        if rewritten:
            said = f"{_count(rewritten)}: blocks are of keys of like direction"
            ctx.note("history", "rewritten", said)
        return rewritten > 0

    def _sorted(self, call: SparseCall, site: AttentionSite, ctx: PassContext) -> Sorted:
        keys = call.history
        assert keys is not None
        (segment,) = [one for one in site.segments if one.role == "history"]
        first = call.sink_latents * int(segment.grid[1]) * int(segment.grid[2])
        block, operators = math.prod(call.tile[:3]), torch.ops.lipass
        basis = emit_behind(keys, ctx, operators.key_basis.default, self.axes, self.seed, first)
        emit = Emitter(basis.next, ctx, inside=False)
        order = emit(operators.key_order.default, keys, basis, first, block)
        means = emit(operators.pool_in_order.default, keys, order, block)
        return basis, order, means

    def _query_tile(self, tile: tuple[int, ...]) -> tuple[int, ...]:
        """Halve a tile until it has no more than `query_block` tokens."""
        sizes = list(tile)
        while math.prod(sizes) > self.query_block and max(sizes) % 2 == 0:
            at = sizes.index(max(sizes))
            sizes[at] //= 2
        return tuple(sizes)


def _refusal(call: SparseCall, keys: Node, written: set[int]) -> str | None:
    if call.planner != "mean":
        return f"its blocks are chosen by {call.planner}"
    if call.latent_mask is not None:
        return "a mask says which latents see which, and a bucket holds keys of all"
    if call.budget == 1.0:
        return "every block of its history is visited"
    if storage(value(keys)) in written:
        return "its history is written to, so that no order of it can be kept"
    return None


def _count(calls: int) -> str:
    return "1 call" if calls == 1 else f"{calls} calls"
