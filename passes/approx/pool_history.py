"""Average the blocks of a history once a chunk: no denoising step changes its keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from lipass.passes.attention.site import sites
from lipass.passes.attention.sparse_call import SparseCall
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.compat import hint, is_parameter, value
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.marks import step_of
from lipass.passes.graph.ops import is_view
from lipass.passes.graph.writes import memory_written, storage


@dataclass(frozen=True)
class PoolHistory(Pass):
    """Compute the means by which decode chooses blocks of the history in a call of their own.

    ::

        %o = lipass.sparse_attention(%q, [%hist_k, %k], .., 'decode', None, 'blocks.0.attn')

        %means = lipass.pool_blocks(%hist_k, [n, 8, 8], [4, 4, 4])
        %o = lipass.sparse_attention(%q, [%hist_k, %k], .., history_means = %means)

    In an unrolled loop the new call stands in front of the steps. Where the loop is in Python,
    `hoist-calls` outlines it, and an open session keeps the means for the same keys.

    Keeps: keys that are computed in the step, or from more than an input; keys that are written
    to; histories of less than `numbers_min`; sites that visit every block.
    """

    name: ClassVar[str] = "pool-history"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    requires: ClassVar[tuple[str, ...]] = ("find-attention",)
    precedes: ClassVar[tuple[str, ...]] = ("guard-steps", "hoist-calls", "share-blocks")
    section: ClassVar[str | None] = "sparse"
    in_dense_twin: ClassVar[bool] = False

    numbers_min: int = 1 << 22
    """Numbers in the keys of a history, `B * H * L * D`; the means of fewer cost less than a call
    of their own."""

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        written = {at for node in graph.nodes for at in memory_written(node)}
        first_call = next(node for node in graph.nodes if node.op != "placeholder")
        means: dict[tuple[Node, tuple[int, ...]], Node] = {}
        kept: dict[str, int] = {}
        rewritten = 0
        for node, site in sites(graph):
            call = SparseCall.of(node) if SparseCall.is_one(node) else None
            if call is None or call.history is None:
                continue
            ctx.failing = node
            keys = call.history
            if why := self._refusal(node, call, keys, written):
                kept[why] = kept.get(why, 0) + 1
                continue
            tile = call.tile[:3]
            if (keys, tile) not in means:
                behind = first_call if keys.op == "placeholder" else keys.next
                emit = Emitter(behind, ctx, inside=False)
                (segment,) = [one for one in site.segments if one.role == "history"]
                grid = emit.grid(segment.grid, keys)
                pooled = emit(torch.ops.lipass.pool_blocks.default, keys, grid, list(tile))
                means[keys, tile] = pooled
            replace(call, history_means=means[keys, tile]).write(node)
            rewritten += 1
        ctx.failing = None
        # Not under the name of a site: it is rewritten, wherever its means are computed.
        for why, count in kept.items():
            ctx.note("history", "kept", f"{_count(count)}: {why}")
        if rewritten:
            ctx.note("history", "rewritten", f"{_count(rewritten)}: means once for the same keys")
        return rewritten > 0

    def _refusal(self, node: Node, call: SparseCall, keys: Node, written: set[int]) -> str | None:
        if call.planner in ("given", "buckets"):
            return "its blocks are chosen by no means"
        if call.budget == 1.0:
            return "every block of its history is visited"
        if hint(value(keys).numel()) < self.numbers_min:
            return f"its history holds less than {self.numbers_min} numbers"
        if storage(value(keys)) in written:
            return "its history is written to"
        if step_of(node) is None and not _is_of_an_input(keys):
            return "its history is computed in each call"
        if step_of(node) is not None and step_of(keys) is not None:
            return "its history is computed in each step"
        return None


def _count(calls: int) -> str:
    return "1 call" if calls == 1 else f"{calls} calls"


def _is_of_an_input(keys: Node) -> bool:
    """Whether keys are an input that is no parameter, or a view of one."""
    while is_view(keys) and isinstance(keys.args[0], Node):
        keys = keys.args[0]
    return keys.op == "placeholder" and not is_parameter(keys)
