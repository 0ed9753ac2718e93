"""Run one call dense: every query attends to all keys that frames and masks leave.

What is left out is hidden by a mask over keys, or by calls of their own for each latent of the
queries: a mask of every query and key would be gigabytes where a GPU is worth having.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels import dense
from lipass.kernels.call import Call
from lipass.kernels.latent_mask import seen_from, seen_keys
from lipass.kernels.pieces import attend_to_all
from lipass.kernels.plan import BlockGrid
from lipass.kernels.token_major import token_major

# Entries of the largest mask of queries and keys that is made.
_MASK_ENTRIES = 1 << 24


def attend_densely(call: Call, lse: bool) -> tuple[Tensor, Tensor | None, str]:
    """Attend to every kept key.

    In prefill the queries of dropped frames see what the others see: nobody reads their rows.

    Returns:
        Token-major output, the log-sum-exp `[B, H, Lq]` fp32 or None, and what ran.
    """
    if call.latent_mask is not None:
        return _attend_by_mask(call, call.latent_mask, lse)
    if call.keep_frames is not None and call.key_bias is None and not lse:
        mask = seen_of_frames(call, call.keep_frames)[:, None, None]
        out = _sdpa(call, call.q, *_joined(call), mask)
        return token_major(out), None, "sdpa"
    bias = call.key_bias
    if call.keep_frames is not None:
        bias = hidden(call, call.keep_frames)
    if bias is None and not lse:
        out, provider = attend_to_all(call.q, call.k, call.v, call.scale)
        return out, None, provider
    return dense.attend_biased(call.q, call.k, call.v, call.scale, bias, lse=lse)


def hidden(call: Call, keep: Tensor) -> Tensor:
    """Add to the bias of a call what hides keys of dropped frames, `[B, H or 1, Lk]`."""
    bias = torch.where(seen_of_frames(call, keep), 0.0, -math.inf)[:, None]
    return bias if call.key_bias is None else bias + call.key_bias.float()


def seen_of_frames(call: Call, keep: Tensor) -> Tensor:
    """Say which keys are left where `keep` `[B, T]` frames of the candidates are, `[B, Lk]`.

    Where the queries are of these frames too and none is left, all are: rows have to stay finite.
    """
    number = call.candidate
    assert number is not None
    keep = keep.to(call.q.device, non_blocking=True)
    if call.role != "decode":
        keep = keep | ~keep.any(1, keepdim=True)
    grid, span = call.layout.segments[number].grid, call.layout.token_range(number)
    frames = grid.over_tokens(keep)
    ends = (span.start, call.layout.tokens - span.stop)
    return F.pad(frames, ends, value=True)


def _attend_by_mask(call: Call, mask: Tensor, lse: bool) -> tuple[Tensor, Tensor | None, str]:
    """Attend under a mask over latents, in one call or one for each latent of the queries."""
    entries = mask.shape[0] * call.q_grid.tokens * call.layout.tokens
    k, v = _joined(call)
    if entries <= _MASK_ENTRIES:
        seen = seen_keys(mask.to(call.q.device, non_blocking=True), call.q_grid, call.layout)
        return _attend_under(call, call.q, k, v, seen, lse)
    parts = []
    for latent, q in enumerate(call.q.split(_per_latent(call.q_grid), 2)):
        seen = seen_from(mask, latent, call.layout)
        end = call.layout.tokens
        if mask.device.type == "cpu" and mask.shape[0] == 1 and (places := seen.nonzero()).numel():
            end = int(places[-1, 3]) + 1  # keys behind are seen by none: a causal order
        part = seen[..., :end].to(q.device, non_blocking=True)
        parts.append(_attend_under(call, q, k[:, :, :end], v[:, :, :end], part, lse, end))
    outputs, log_sums, names = zip(*parts, strict=True)
    whole = torch.cat([row for row in log_sums if row is not None], 2) if lse else None
    return token_major(torch.cat(outputs, 2)), whole, names[0]


def _attend_under(
    call: Call, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, lse: bool, end: int | None = None
) -> tuple[Tensor, Tensor | None, str]:
    """Attend where keys are seen, `[B or 1, 1, Lq or 1, Lk]` bool."""
    if call.key_bias is None and not lse:
        return token_major(_sdpa(call, q, k, v, seen)), None, "sdpa"
    bias = seen.new_zeros((), dtype=torch.float32)
    if call.key_bias is not None:
        bias = call.key_bias[..., :end].float()[:, :, None]
    shift = torch.where(seen, bias, -math.inf)
    out, log_sums = dense.attend_plainly(q, k, v, call.scale, shift)
    return out, log_sums if lse else None, "plain"


def _sdpa(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)


def _joined(call: Call) -> tuple[Tensor, Tensor]:
    return torch.cat(call.k, 2), torch.cat(call.v, 2)


def _per_latent(grid: BlockGrid) -> int:
    return grid.tokens // max(grid.grid[0], 1)
