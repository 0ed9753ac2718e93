"""Count products of one model call, in FLOPs: attention by visits, linear layers by rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lipass.kernels.plan import BlockGrid, KvLayout
from lipass.kernels.select.vectorized import rule_of
from lipass.options import SparseOptions

from .families import Family


@dataclass(frozen=True)
class Cost:
    """FLOPs of all layers.

    Attributes:
        attention: scores and weighted sums over the keys that are visited.
        dense_attention: over all keys of the same call.
        linear: layers that every token or latent meets.
    """

    attention: float = 0.0
    dense_attention: float = 0.0
    linear: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.attention + other.attention,
            self.dense_attention + other.dense_attention,
            self.linear + other.linear,
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(self.attention * times, self.dense_attention * times, self.linear * times)

    @property
    def total(self) -> float:
        """Attention and linear layers."""
        return self.attention + self.linear


def call_cost(
    family: Family,
    role: str,
    latents: int,
    context_latents: int,
    sparse: SparseOptions | None,
    *,
    hoisted: bool,
    first: bool = True,
    rows_latents: int = 0,
) -> Cost:
    """Count one call of a model.

    Args:
        family: its widths.
        role: `"prefill"`, `"self"` or `"decode"`.
        latents: that are queries.
        context_latents: of the history that `decode` reads.
        sparse: options of sparse attention; None is dense.
        hoisted: whether products that no token or no step changes are made once, as the exact
            passes do.
        first: whether this is the first call of its chunk, which makes what is kept.
        rows_latents: latents that products are made for, where sequences are filled up.
    """
    queries = max(latents, rows_latents) * family.latent_tokens
    keys, visited = _keys(family, role, latents, context_latents, sparse)
    pair = 4.0 * family.attention_width * family.streams
    beside = 0.0 if family.joint_text else 4.0 * family.attention_width * family.text_tokens
    rows = latents if hoisted else queries
    kept = 0 if hoisted and not first else queries
    linear = 2.0 * (
        queries * family.token_weights + rows * family.row_weights + kept * family.kept_weights
    )
    dense_layers = 0 if sparse is None else len(sparse.dense_layers)
    sparse_layers = family.layers - dense_layers
    text = family.layers * queries * beside
    dense = family.layers * queries * pair * keys
    attention = queries * pair * (dense_layers * keys + sparse_layers * visited)
    return Cost(attention + text, dense + text, family.layers * linear)


def _keys(
    family: Family, role: str, latents: int, context_latents: int, sparse: SparseOptions | None
) -> tuple[float, float]:
    """Return keys of a query, and how many of them it visits."""
    text = family.text_tokens if family.joint_text else 0
    history = context_latents if role == "decode" else 0
    candidates = (history or latents) * family.latent_tokens
    others = text + (latents * family.latent_tokens if history else 0)
    if sparse is None or (role == "decode" and not history):
        return candidates + others, candidates + others
    budget = getattr(sparse, f"budget_{role}")
    return candidates + others, others + candidates * _share(
        family.latent_grid, latents, history, role, budget, sparse
    )


def _share(
    grid: tuple[int, int],
    latents: int,
    history: int,
    role: str,
    budget: float,
    sparse: SparseOptions,
) -> float:
    """Return the share of candidate blocks that a query block visits, as the selection rules."""
    roles = ("history", "current") if history else ("current",)
    grids = ((history, *grid), (latents, *grid)) if history else ((latents, *grid),)
    layout = KvLayout.build(roles, grids, sparse.tile)
    q_grid = BlockGrid((latents, *grid), sparse.query_tile or sparse.tile)
    rule = rule_of(layout, q_grid, budget, role, sparse.sink_latents, torch.device("cpu"))
    return float(rule.wanted / rule.grid.blocks)
