"""Try one attention call of a family's shape, smaller, on inputs that have structure.

Weights are random, so the price in pictures says nothing; but what a budget loses of attention
over content that varies slowly in space and drifts in time can be seen, beside the same call on
white noise, where every choice of blocks is as bad as any other.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels import KvLayout, block_sparse_attention, plan_attention
from lipass.kernels.plan import BlockGrid, BlockPlan
from lipass.options import SparseOptions

from .families import Family

_CHANNELS = 16
# Cells of the slow content along an axis, and how peaked attention is: most of the mass of a row
# lies on a tenth of the keys.
_CELLS, _SHARPNESS = 6, 6.0
_HEADS, _REPEATS = 2, 5
# Tokens of a latent and latents of each segment, at most.
_LATENT_TOKENS, _LATENTS = 900, 8


def try_one(family: Family, sparse: SparseOptions, *, seed: int = 0) -> dict[str, object]:
    """Compare sparse attention of one block with dense attention on a CPU.

    Args:
        family: its heads, widths and what a chunk reads.
        sparse: the options.
        seed: of content and weights.

    Returns:
        Density, relative error and share of attention mass kept, on slow content and on noise;
        times in ms of dense and sparse, medians, in turn.
    """
    rows, columns = grid_of(family)
    current = min(family.chunk_latents, _LATENTS)
    history = _LATENTS if family.chunk_latents < _LATENTS else 0
    result: dict[str, object] = {"grid": [history + current, rows, columns]}
    for kind in ("slow", "noise"):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = _tokens(kind, (history + current, rows, columns), family.head_dim, generator)
        q = q[:, :, history * rows * columns :]
        layout, role = _layout(history, current, (rows, columns), sparse)
        result[kind] = _compare(q, k, v, layout, role, current, (rows, columns), sparse)
    return result


def grid_of(family: Family) -> tuple[int, int]:
    """Return tokens of a latent `(Y, X)`, fewer than the family's where it has too many."""
    shrink = -(-family.latent_tokens // _LATENT_TOKENS)
    rows, columns = (round(side / shrink**0.5) for side in family.latent_grid)
    return rows, columns


def _tokens(
    kind: str, grid: tuple[int, int, int], head_dim: int, generator: torch.Generator
) -> list[Tensor]:
    """Return queries, keys and values `[1, 2, L, D]` of content over a grid."""
    frames, rows, columns = grid
    if kind == "noise":
        content = torch.randn(_CHANNELS, frames, rows, columns, generator=generator)
    else:
        coarse = torch.randn(1, _CHANNELS, frames // 4 + 2, _CELLS, _CELLS, generator=generator)
        content = F.interpolate(coarse, (frames, rows, columns), mode="trilinear")[0]
        content = content / content.std()
    tokens = content.flatten(1).T
    # Queries and keys share weights: what is alike attends to each other.
    matching, shown = (
        torch.randn(_CHANNELS, _HEADS * head_dim, generator=generator) / _CHANNELS**0.5
        for _ in range(2)
    )
    q = _SHARPNESS**0.5 * (tokens @ matching)
    return [x.view(1, -1, _HEADS, head_dim).transpose(1, 2) for x in (q, q, tokens @ shown)]


def _layout(
    history: int, current: int, latent: tuple[int, int], sparse: SparseOptions
) -> tuple[KvLayout, str]:
    if not history:
        return KvLayout.build(("current",), ((current, *latent),), sparse.tile), "self"
    grids = ((history, *latent), (current, *latent))
    return KvLayout.build(("history", "current"), grids, sparse.tile), "decode"


def _compare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: KvLayout,
    role: str,
    current: int,
    latent: tuple[int, int],
    sparse: SparseOptions,
) -> dict[str, float]:
    spans = [layout.token_range(n) for n in range(len(layout.segments))]
    keys = [k[:, :, span.start : span.stop] for span in spans]
    values = [v[:, :, span.start : span.stop] for span in spans]
    q_grid = BlockGrid((current, *latent), sparse.query_tile or sparse.tile)
    scale = q.shape[-1] ** -0.5

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    def plan() -> BlockPlan:
        return plan_attention(
            q, keys, layout, q_grid, budget=getattr(sparse, f"budget_{role}"), scale=scale,
            role=role, sink_latents=sparse.sink_latents,
        )  # fmt: skip

    def ours() -> Tensor:
        out = block_sparse_attention(q, keys, values, plan(), scale=scale)
        assert isinstance(out, Tensor)
        return out

    expected, found = dense(), ours()
    sampled = torch.arange(0, q.shape[2], max(q.shape[2] // 256, 1))
    weights = (q[:, :, sampled] @ k.transpose(-2, -1) * scale).softmax(-1)
    seen = plan().to_dense_mask()[:, :, sampled]
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(_REPEATS):
        for name, call in (("dense", dense), ("sparse", ours)):
            begin = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {
        "density": float(plan().density()),
        "relative_error": float((found - expected).norm() / expected.norm()),
        "mass_kept": float((weights * seen).sum(-1).mean()),
        "dense_ms": statistics.median(times["dense"]),
        "sparse_ms": statistics.median(times["sparse"]),
    }
