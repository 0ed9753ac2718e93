"""Attend to the keys of a history that differ: those that correspond across latents are one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

# The import registers the operator that the pass inserts.
import lipass.kernels.merged_history  # noqa: F401
from lipass.passes.attention import cache_pieces
from lipass.passes.attention.latent_mask import BY_LATENTS
from lipass.passes.attention.match import Operands, Refusal
from lipass.passes.attention.site import OVER_LATENTS, AttentionSite, move_site, sites
from lipass.passes.attention.sources import source_of
from lipass.passes.attention.sparse_call import SparseCall
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.emit import Emitter, refuse_grid, refuse_rewrite

ROLES = (*OVER_LATENTS, "other")
"""Of sites that get a note; cross-attention has no history."""


@dataclass(frozen=True)
class MergeHistory(Pass):
    """Attend to a history of which keys that correspond across latents have been merged.

    ::

        %key = cat([%text_k, %hist_k, %k], 2);  %value = cat([%text_v, %hist_v, %v], 2)
        %o = scaled_dot_product_attention(%q, %key, %value)

        %o = lipass.attend_merged(%q, [%text_k, %hist_k, %k], [%text_v, %hist_v, %v], 1, 64,
               0.125, 0.7, 4096, 1, 'blocks.0.attn')

    A token whose key is the nearest to one of the history, and that to it, takes its place if the
    weights of queries hardly change by that; its value is the mean of all that came there, and
    `log m` on the score counts them. For equal keys that is exact. Distances are measured by what
    the queries see of them, so it does not matter which positions or cameras keys carry. Beyond
    `kv_tokens` those that were joined least recently are left out.

    An open session merges once a chunk, what is new in the cache, and never the chunk that is
    denoised; without one each call merges what it is given. How many keys are left is in no
    shape, so nothing is compiled again. What merging has done to scores is in the receipt.

    Keeps: sites of other roles than decode; a history that the graph computes, or gives positions
    in each call, so that no key stays what it was; masks over latents; what `lipass.attend` has
    planted; calls whose gradient is recorded or whose kernel was chosen. A site that is merged is
    neither pruned nor made sparse.
    """

    name: ClassVar[str] = "merge-history"
    numerics: ClassVar[Numerics] = Numerics.APPROX
    requires: ClassVar[tuple[str, ...]] = ("find-attention",)
    precedes: ClassVar[tuple[str, ...]] = (
        "prune-context",
        "sparse-attention",
        "attend-pieces",
        "guard-steps",
        "hoist-calls",
        "share-blocks",
    )
    section: ClassVar[str | None] = "merge"
    rewrites_attention: ClassVar[bool] = True

    threshold: float = 1.0
    """How alike keys are that merge, 0..1; see `merge.threshold`."""
    kv_tokens: int | None = None
    """Most tokens of a history that are kept a head."""
    sink_latents: int = 0
    """Leading latents that stay as they are."""

    @classmethod
    def options_from(cls, options: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        if not options.get("merge"):
            return {}
        same = ("threshold", "kv_tokens", "sink_latents")
        return {name: options[f"merge.{name}"] for name in same}

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        changed = False
        for node, site in sites(graph):
            if site.role not in ROLES:
                continue
            ctx.failing = node
            operands = _operands(node, site, ctx)
            if isinstance(operands, Refusal):
                ctx.note(site.name, "kept", operands.reason)
                continue
            self._rewrite(node, site, operands, ctx)
            ctx.note(site.name, "rewritten", f"decode, history merged at {self.threshold:g}")
            changed = True
        ctx.failing = None
        return changed

    def _rewrite(
        self, node: Node, site: AttentionSite, operands: Operands, ctx: PassContext
    ) -> None:
        assert site.q_grid is not None
        call = Emitter(node, ctx)(
            torch.ops.lipass.attend_merged.default,
            operands.q,
            list(operands.keys),
            list(operands.values),
            _history(site),
            int(site.q_grid[1]) * int(site.q_grid[2]),
            operands.scale,
            self.threshold,
            self.kv_tokens,
            self.sink_latents,
            site.name,
        )
        move_site(site, call)
        node.replace_all_uses_with(call)
        node.graph.erase_node(node)


def _operands(node: Node, site: AttentionSite, ctx: PassContext) -> Operands | Refusal:
    """Match a call whose history can be merged."""
    if site.role != "decode":
        return Refusal(f"{site.role}: {site.reason}")
    if SparseCall.is_one(node):
        return Refusal("lipass.attend chooses what it reads")
    if why := refuse_rewrite(node) or refuse_grid(site):
        return Refusal(why)
    if site.latent_mask:
        return Refusal(BY_LATENTS)
    found = cache_pieces.operands(node, site, ctx)
    if isinstance(found, Refusal):
        return found
    if found.joined_keys:
        return Refusal("its keys are given positions in each call, so that none stays what it was")
    if not source_of(found.keys[_history(site)]).is_given:
        return Refusal("its history is computed in the graph, and is another in each call")
    return found


def _history(site: AttentionSite) -> int:
    """Return which of the pieces is the history."""
    return [segment.role for segment in site.segments].index("history")
