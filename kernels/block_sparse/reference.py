"""Define block-sparse attention, one query block at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipass.kernels.block_sparse.kind import Kind
from lipass.kernels.plan import BlockPlan
from lipass.kernels.token_major import token_major

READS_ORDER = True


def why_not(kind: Kind) -> str | None:
    """Refuse nothing: the definition covers every call."""
    return None


def block_sparse_attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    plan: BlockPlan,
    *,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend each query block to the keys of the blocks it visits, in fp32.

    ```text
    keys(n)  = tokens of blocks indices[n, :counts[n]] that exist and are kept
    s        = scale * q @ k[keys].T + key_bias[keys]
    out, lse = softmax(s) @ v[keys], logsumexp(s)
    ```

    A query that sees no key gives 0 and lse `-inf`. Where the plan has an order, tokens are those
    that it has at the places of a block.

    Args:
        q: queries `[B, H, Lq, D]`.
        keys: keys `[B, H, Lk, D]`, whole or by segment.
        values: values like `keys`.
        plan: which key blocks each query block visits.
        scale: factor on the scores.
        key_bias: added to the scores of a key, `[B or 1, H or 1, Lk]`, or None.
        return_lse: ignored, the log-sum-exp costs nothing here.

    Returns:
        Output `[B, H, Lq, D]` in `q.dtype` and log-sum-exp (base e) `[B, H, Lq]` fp32.
    """
    batch, heads, _, _ = q.shape
    k, v = torch.cat(keys, 2), torch.cat(values, 2)
    out = torch.zeros_like(q, dtype=torch.float32, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device)
    q_index, k_index = plan.q_grid.token_index(q.device), plan.kv.token_index(q.device)
    for b in range(batch):
        for h in range(heads):
            key_at, query_at = _tokens_at_places(plan, b, h, q.device)
            for n, rows in enumerate(q_index):
                rows = query_at[rows[rows >= 0]]
                visited = plan.indices[b, h, n, : int(plan.counts[b, h, n])].long()
                seen = k_index[visited].flatten()
                seen = key_at[seen[seen >= 0]]
                if plan.key_keep is not None:
                    seen = seen[plan.key_keep[b, seen]]
                if seen.numel() == 0:
                    continue
                score = scale * (q[b, h, rows].float() @ k[b, h, seen].float().mT)
                if key_bias is not None:
                    score = score + key_bias[b % key_bias.shape[0], h % key_bias.shape[1], seen]
                out[b, h, rows] = score.softmax(-1) @ v[b, h, seen].float()
                lse[b, h, rows] = score.logsumexp(-1)
    return token_major(out.to(q.dtype)), lse


def _tokens_at_places(
    plan: BlockPlan, b: int, h: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Say which key, over all segments, and which query stands at each place in one head."""
    order, starts = plan.order, [0]
    for tokens in plan.segment_tokens:
        starts.append(starts[-1] + tokens)
    key_at = []
    for n, segment in enumerate(plan.kv.segments):
        own = torch.arange(segment.grid.tokens, device=device)
        if order is not None and n == order.segment:
            own = order.keys[b, h].long()
        key_at.append(own + starts[n])
    query_at = torch.arange(plan.q_grid.tokens, device=device)
    return torch.cat(key_at), query_at if order is None else order.queries[b, h].long()


def merge_partials(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint key sets into attention over their union.

    Args:
        outputs: partial outputs `[B, H, Lq, D]`.
        lses: their log-sum-exps `[B, H, Lq]`, base e; `-inf` where no key was seen.

    Returns:
        Output in the dtype of the first partial, and log-sum-exp fp32.
    """
    stacked = torch.stack([lse.float() for lse in lses])
    total = stacked.logsumexp(0)
    # Where no partial saw a key the softmax of nothing is nan.
    weight = stacked.softmax(0).masked_fill(total == -math.inf, 0.0)
    merged = sum(w[..., None] * out.float() for w, out in zip(weight, outputs, strict=True))
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype), total
