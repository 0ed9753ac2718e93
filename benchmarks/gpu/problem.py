"""One attention call of a released model: its tensors on the device, and how it is planned."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.part import Part
from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout, Triple
from lipass.kernels.planning import plan_attention

NONE = (0, 1, 1)


class Problem:
    """Queries, keys and values of one call.

    Args:
        part: where it runs.
        batch: items.
        heads: of attention.
        text: text tokens.
        history: grid of the history; `NONE` is a prefill.
        current: grid of the new latents.
        tile: of blocks.
        dim: head dim.
        runs: whether tokens stand in the order of the tiles, so that each block is a run.
        whole: whether tokens are cut off until every block is whole, as some rivals need.
    """

    def __init__(
        self, part: Part, batch: int, heads: int, text: int, history: Triple, current: Triple,
        tile: Triple, *, dim: int = 128, runs: bool = False, whole: bool = False,
    ) -> None:  # fmt: skip
        volume = tile[0] * tile[1] * tile[2]

        def laid(grid: Triple) -> Triple:
            tokens = grid[0] * grid[1] * grid[2]
            return (1, 1, tokens // volume * volume if whole else tokens) if runs else grid

        roles, grids = ["current"], [laid(current)]
        self.role = "prefill"
        if history[0]:
            self.role, roles, grids = "decode", ["history", *roles], [laid(history), *grids]
        if text:
            words = text // volume * volume if whole else text
            roles, grids = ["text", *roles], [(1, 1, words), *grids]
        self.tile = (1, 1, volume) if runs else tile
        self.roles, self.grids, self.heads = roles, grids, heads
        self.scale = dim**-0.5
        self.layout = KvLayout.build(tuple(roles), tuple(grids), self.tile)
        self.q_grid = BlockGrid(grids[-1], self.tile)

        def draw(tokens: int) -> Tensor:
            shape = (batch, tokens, heads, dim)
            return torch.randn(shape, device=part.device, dtype=part.dtype).transpose(1, 2)

        self.q = draw(self.q_grid.tokens)
        tokens = [segment.grid.tokens for segment in self.layout.segments]
        self.k, self.v = [draw(n) for n in tokens], [draw(n) for n in tokens]
        self.candidate = roles.index("history" if history[0] else "current")

    def plan(self, budget: float, means: Tensor | None = None) -> BlockPlan:
        """Choose blocks."""
        return plan_attention(
            self.q, self.k, self.layout, self.q_grid, budget=budget, scale=self.scale,
            role=self.role, sink_latents=0, candidate_means=means,
        )  # fmt: skip

    def pairs(self, plan: BlockPlan) -> float:
        """Count query and key tokens that meet, over all heads."""
        device = self.q.device
        queries = self.q_grid.lengths(device).double()
        keys = (plan.kv.token_index(device) >= 0).sum(-1).double()
        kept = torch.arange(plan.indices.shape[-1], device=device) < plan.counts[..., None]
        visited = (keys[plan.indices.clamp(min=0).long()] * kept).sum(-1)
        return float((visited * queries).sum())

    @property
    def all_pairs(self) -> float:
        """The same for dense attention."""
        keys = sum(part.shape[2] for part in self.k)
        return float(self.q.shape[0] * self.heads * self.q.shape[2] * keys)

    def operator(self, budget: float) -> Tensor:
        """Call the operator as a compiled model does: it plans, and the gate decides."""
        out: Tensor = torch.ops.lipass.sparse_attention(
            self.q, self.k, self.v, list(self.grids[-1]), [n for g in self.grids for n in g],
            ",".join(self.roles), list(self.tile), budget, self.scale, 0, self.role, None, "day",
        )  # fmt: skip
        return out

    def expected(self, plan: BlockPlan, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend densely under the mask of a plan, in fp64; give output and log-sum-exp."""
        k, v = torch.cat(self.k, 2).double(), torch.cat(self.v, 2).double()
        score = self.q.double() @ k.mT * self.scale
        if bias is not None:
            score = score + bias[:, None, None]
        score = score.masked_fill(~plan.to_dense_mask(), -torch.inf)
        return score.softmax(-1) @ v, score.logsumexp(-1)
