"""Attend by a plan that sorts queries and keys: sorted copies for providers that read no order."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lipass.kernels.plan import BlockPlan, Order
from lipass.kernels.token_major import empty_token_major


def attend(
    module: ModuleType,
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    plan: BlockPlan,
    *,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool,
    laid: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Call a provider; arguments as in `lipass.kernels.block_sparse.api`.

    `laid` is what the provider has found of the tensors when it was asked, if it looked.

    Providers with `READS_ORDER` take the order as it is. The others get sorted queries and keys,
    and their rows are put back.
    """
    order = plan.order
    if order is None or getattr(module, "READS_ORDER", False):
        known = {} if laid is None else {"laid": laid}
        out, lse = module.block_sparse_attention(
            q, keys, values, plan, scale=scale, key_bias=key_bias, return_lse=return_lse, **known
        )
        return out, lse
    if key_bias is not None:
        key_bias = _in_order(key_bias, plan, order)
    out, lse = module.block_sparse_attention(
        rows_at(q, order.queries),
        _in_segment(keys, order),
        _in_segment(values, order),
        plan._replace(order=None),
        scale=scale,
        key_bias=key_bias,
        return_lse=return_lse,
    )
    back = order.queries.long()
    placed = empty_token_major(q)
    placed.scatter_(2, back[..., None].expand_as(out), out)
    return placed, None if lse is None else torch.empty_like(lse).scatter_(2, back, lse)


def rows_at(x: Tensor, order: Tensor) -> Tensor:
    """Return rows `[B, H, places, D]` of `x [B, H, L, D]`, each head in its own order."""
    batch, heads, tokens, dim = x.shape
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * tokens
    rows = x.reshape(-1, dim).index_select(0, (order + first).flatten())
    return rows.view(batch, heads, -1, dim)


def _in_segment(parts: list[Tensor], order: Order) -> list[Tensor]:
    parts = list(parts)
    parts[order.segment] = rows_at(parts[order.segment], order.keys)
    return parts


def _in_order(bias: Tensor, plan: BlockPlan, order: Order) -> Tensor:
    parts = list(bias.split(plan.segment_tokens, 2))
    shape = order.keys.shape
    whole = parts[order.segment].expand(*shape[:2], -1).gather(2, order.keys.long())
    parts[order.segment] = whole
    return torch.cat([part.expand(*shape[:2], -1) for part in parts], 2)
