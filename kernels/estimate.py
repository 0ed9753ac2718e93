"""Estimate what a plan loses: the attention mass of a few queries that its keys hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipass.kernels.plan import BlockPlan

# Query blocks that are looked at, one query each.
_SAMPLED = 8


@torch.no_grad()
def kept_mass(
    q: Tensor,
    keys: list[Tensor],
    plan: BlockPlan,
    scale: float,
    key_bias: Tensor | None,
    seen: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the share of their attention mass that sampled queries keep, a 0-d tensor.

    An output row moves by at most twice what its query lacks to 1, times the longest value. It
    takes the scores of one query of at most eight blocks with every key.

    Args:
        q: queries `[B, H, Lq, D]`.
        keys: one tensor `[B, H, L, D]` per segment.
        plan: which key blocks each query block visits.
        scale: softmax scale.
        key_bias: added to the scores of keys `[B or 1, H or 1, Lk]`, or None.
        seen: gives the keys that the model's own mask shows to query blocks `[N]`,
            `[B or 1, 1, N, Lk]` bool; a plan that leaves the others out loses nothing by it.
    """
    every = plan.q_grid.blocks
    blocks = torch.arange(0, every, max(-(-every // _SAMPLED), 1), device=q.device)
    places = plan.q_grid.token_index(q.device)[blocks, 0]
    if plan.order is None:
        rows = q[:, :, places]
    else:
        at = plan.order.queries.long()[:, :, places]
        rows = q.gather(2, at[..., None].expand(-1, -1, -1, q.shape[3]))
    score = torch.cat([rows.float() @ part.float().mT for part in keys], -1) * scale
    if key_bias is not None:
        score = score + key_bias.float()[:, :, None]
    if seen is None:
        return (score.softmax(-1) * plan.keys_of(blocks)).sum(-1).mean()
    shown = seen(blocks)
    weight = score.masked_fill(~shown, -math.inf).softmax(-1)
    kept = (weight * plan.keys_of(blocks)).sum(-1)
    return kept.masked_fill(~shown.any(-1), 1.0).mean()  # who sees nothing loses nothing


def capturing() -> bool:
    """Whether a CUDA graph is being captured, in which a call would be looked at for ever."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
