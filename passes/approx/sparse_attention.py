"""Replace attention over latents by the block-sparse call, which takes keys in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

# The import registers an operator that the pass has to know.
import lipass.kernels.distinct  # noqa: F401
from lipass.passes.attention import cache_pieces
from lipass.passes.attention.match import Operands, Refusal
from lipass.passes.attention.site import OVER_LATENTS, AttentionSite, sites
from lipass.passes.attention.sparse_call import SparseCall, replace_attention
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.compat import known_true
from lipass.passes.graph.emit import refuse_grid, refuse_rewrite
from lipass.passes.graph.marks import step_of
from lipass.passes.graph.names import repeat_of

RANKINGS = {"product": "mean", "cosine": "cosine"}
"""Name of a ranking to the planner of the operator that ranks so."""


@dataclass(frozen=True)
class SparseAttention(Pass):
    """Call `lipass::sparse_attention` at sites over latents; the concatenations fall away.

    ::

        %key = cat([%text_k, %hist_k, %k], 2);  %value = cat([%text_v, %hist_v, %v], 2)
        %o = scaled_dot_product_attention(%q, %key, %value)

        %o = lipass.sparse_attention(%q, [%text_k, %hist_k, %k], [%text_v, %hist_v, %v],
               [4, 8, 8], [1, 1, 32, n, 8, 8, 4, 8, 8], 'text,history,current', [4, 4, 4],
               0.3, 0.125, 1, 'decode', None, 'blocks.0.attn')

    Queries that hold text too are cut: rows of text attend to all keys as before, rows of latents
    to all of the text and to chosen latents. A mask over keys becomes `key_bias`; one that says
    which latents see which becomes `latent_mask`, with tiles of one latent.

    A site that `prune-context` rewrote gets tile, budget and sink here and keeps its frames.

    Keeps: sites of role cross, text and other, whose keys are no latent grid; `dense_layers`;
    calls whose gradient is recorded or whose kernel was chosen.
    """

    name: ClassVar[str] = "sparse-attention"
    numerics: ClassVar[Numerics] = Numerics.APPROX
    requires: ClassVar[tuple[str, ...]] = ("find-attention",)
    precedes: ClassVar[tuple[str, ...]] = ("pool-history", "guard-steps")
    section: ClassVar[str | None] = "sparse"
    rewrites_attention: ClassVar[bool] = True
    leaves_out: ClassVar[bool] = True
    in_dense_twin: ClassVar[bool] = False

    tile: tuple[int, ...] = (4, 4, 4)
    """Tokens of one block along `(T, Y, X)`; three more numbers are those of a query block."""
    budget_prefill: float = 1.0
    """Share of the unprotected blocks that prefill visits."""
    budget_self: float = 1.0
    """The same where all frames attend to each other without a history."""
    budget_decode: float = 1.0
    """Share of the history blocks that decode visits."""
    sink_latents: int = 0
    """Leading latents whose blocks are always visited."""
    dense_layers: tuple[int, ...] = ()
    """Attention calls that stay dense, counted from 0 in the order of one model call."""
    dense_steps: int = 0
    """First steps of an unrolled loop that stay dense; of a loop in Python the session knows."""
    ranking: str = "product"
    """What ranks blocks: the `product` of the means of queries and keys, or its `cosine`."""

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise ValueError(
                f"ranking must be one of {', '.join(RANKINGS)}, got {self.ranking!r}; "
                "use 'product'"
            )

    @classmethod
    def options_from(cls, options: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        if not options.get("sparse"):
            return {}
        same = (
            "budget_prefill", "budget_self", "budget_decode", "sink_latents", "dense_layers",
            "dense_steps", "ranking",
        )  # fmt: skip
        tile = options["sparse.tile"] + (options["sparse.query_tile"] or ())
        return {name: options[f"sparse.{name}"] for name in same} | {"tile": tile}

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        changed = False
        layers: dict[str, int] = {}
        for node, site in sites(graph):
            ctx.failing = node
            if node.target is torch.ops.lipass.attend_distinct.default:
                continue  # cross-attention, which collapse-keys has rewritten
            if site.role not in OVER_LATENTS:
                ctx.note(site.name, "kept", f"{site.role}: {site.reason}")
                continue
            call = f"{repeat_of(site.name)}:{site.role}"
            layer = layers[call] = layers.get(call, -1) + 1
            if layer in self.dense_layers:
                ctx.note(site.name, "kept", f"layer {layer} is in dense_layers")
                continue
            if why := refuse_rewrite(node) or refuse_grid(site) or self._early(node, site):
                ctx.note(site.name, "kept", why)
                continue
            operands = _operands(node, site, ctx)
            if isinstance(operands, Refusal):
                ctx.note(site.name, "kept", operands.reason)
                continue
            self._rewrite(node, site, operands, ctx)
            changed = True
        ctx.failing = None
        return changed

    def _early(self, node: Node, site: AttentionSite) -> str | None:
        step = step_of(node)
        if step is None or step.index >= self.dense_steps or site.role != "decode":
            return None
        return f"denoising step {step.index} < dense_steps {self.dense_steps}"

    def _rewrite(
        self,
        node: Node,
        site: AttentionSite,
        operands: Operands | None,
        ctx: PassContext,
    ) -> None:
        budget: float = getattr(self, f"budget_{site.role}")
        tile, sink_latents = self.tile, self.sink_latents
        planner = RANKINGS[self.ranking]
        if site.role == "self" and site.q_grid is not None and known_true(site.q_grid[0] == 1):
            # the one frame there is would be all sink
            tile, sink_latents = _within_frames(tile), 0
        elif site.latent_mask:
            tile = _within_frames(tile)
        ctx.note(site.name, "rewritten", f"{site.role}, budget {budget:g}")
        if operands is None:
            call = SparseCall.of(node)
            replace(
                call, tile=tile, budget=budget, sink_latents=sink_latents, planner=planner
            ).write(node)
            return
        replace_attention(
            node,
            site,
            operands,
            ctx,
            tile=tile,
            budget=budget,
            sink_latents=sink_latents,
            keep_frames=None,
            planner=planner,
        )


def _within_frames(tile: tuple[int, ...]) -> tuple[int, ...]:
    """Give blocks of as many tokens in single frames: `(4, 4, 4)` is `(1, 8, 8)`.

    Frames that attend to themselves alone have no other to fill a block with, and a mask over
    latents shows or hides such a block as a whole.
    """
    flat: list[int] = []
    for t, y, x in (tile[n : n + 3] for n in range(0, len(tile), 3)):
        wide = max(n for n in range(1, t + 1) if t % n == 0 and n * n <= t)
        flat += [1, y * (t // wide), x * wide]
    return tuple(flat)


def _operands(node: Node, site: AttentionSite, ctx: PassContext) -> Operands | Refusal | None:
    """Match a call; None for one that `prune-context` has rewritten."""
    if node.target is torch.ops.lipass.sparse_attention.default:
        return None
    return cache_pieces.operands(node, site, ctx)
