"""Plan a call in which keys of the history and queries are sorted into blocks of like direction.

Blocks are runs of places, so that a block holds keys of like direction wherever in the history
they are from. As many of them are visited as the budget says, the best by the means of queries and
keys: the rule of `lipass.kernels.select`, over other blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lipass.kernels.nearest.order import pool_in_order, sort_queries
from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout, Order, Segment
from lipass.kernels.select.api import select_blocks


class Buckets(NamedTuple):
    """How keys of the history are sorted."""

    order: Tensor
    """Which key stands at each place, `[B, H, L]` int32; result of `sort_keys`."""
    basis: Tensor
    """Main directions of the keys `[B, H, D, axes]` fp32; result of `basis_of`."""


def unfit_buckets(buckets: Buckets, q: Tensor, layout: KvLayout, role: str) -> str | None:
    """Say how an order does not fit a call, or return None."""
    number = layout.candidate_segment(role)
    if role != "decode" or number is None:
        got = "decode without one" if role == "decode" else repr(role)
        return f"planner 'buckets' sorts a history, got a call of role {got}; use planner 'mean'"
    basis = buckets.basis
    if basis.shape[:3] != (*q.shape[:2], q.shape[3]) or basis.dim() != 4:
        return (
            f"history_basis must be [B, H, D, axes] with B, H, D = {[*q.shape[:2], q.shape[3]]}, "
            f"got {list(basis.shape)}; pass what lipass::key_basis returns for these keys"
        )
    expected = (*q.shape[:2], layout.segments[number].grid.tokens)
    order = buckets.order
    if order.shape != expected or order.dtype != torch.int32 or order.device != q.device:
        return (
            f"history_order must be [B, H, L] = {list(expected)} int32 on {q.device}, got "
            f"{list(order.shape)} {order.dtype} on {order.device}; pass what lipass::key_order "
            "returns for these keys"
        )
    return None


def in_rows(layout: KvLayout, q_grid: BlockGrid) -> tuple[KvLayout, BlockGrid]:
    """Cut queries and keys of latents into runs of tokens, as many a block as before."""
    segments = tuple(
        part if part.role == "text" else Segment(part.role, rows_of(part.grid))
        for part in layout.segments
    )
    return KvLayout(segments), rows_of(q_grid)


def rows_of(grid: BlockGrid) -> BlockGrid:
    """Cut the tokens of a grid into runs."""
    return BlockGrid((grid.tokens, 1, 1), (grid.block_tokens, 1, 1))


def plan_in_order(
    q: Tensor,
    keys: list[Tensor],
    layout: KvLayout,
    q_grid: BlockGrid,
    buckets: Buckets,
    *,
    budget: float,
    scale: float,
    first: int,
    means: Tensor | None = None,
) -> BlockPlan:
    """Choose what each block of sorted queries visits; the grids are those of `in_rows`.

    Args:
        q: queries `[B, H, Lq, D]`.
        keys: one tensor `[B, H, L, D]` per segment of the layout.
        layout: the key segments, in runs of tokens.
        q_grid: of the queries, in runs of tokens.
        buckets: how the history is sorted.
        budget: share of the blocks of the history to visit, in `(0, 1]`.
        scale: softmax scale.
        first: keys in front of the order whose blocks are always visited.
        means: result of `pool_in_order`, where it is known.
    """
    number = layout.candidate_segment("decode")
    assert number is not None
    q_order = sort_queries(q, buckets.basis, q_grid.block_tokens)
    if means is None:
        means = pool_in_order(keys[number], buckets.order, layout.block_tokens)
    indices, counts = select_blocks(
        pool_in_order(q, q_order, q_grid.block_tokens),
        means,
        layout,
        q_grid,
        budget=budget,
        scale=scale,
        role="decode",
        sink_latents=first,
    )
    shared = tuple(n for n in range(len(layout.segments)) if n != number)
    order = Order(q_order, buckets.order, number, keys[number].shape[2])
    return BlockPlan(
        indices, counts, q_grid, layout, uniform=True, shared_segments=shared, order=order
    )
