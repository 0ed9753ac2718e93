"""Compute what flash attention and its kin compute, in calls of torch that Dynamo sees."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lipass.adapters.host_ints import plain


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    k_lens: Any = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend token by token, as flash attention lays its operands out.

    Args:
        q: `[B, Lq, H, D]`.
        k: `[B, Lk, Hk, D]`; `H` is a whole number of `Hk`.
        v: `[B, Lk, Hk, Dv]`.
        scale: of the scores; `D ** -0.5` where it is not given.
        causal: the last query sees all keys, the one before it all but the last.
        window: how many keys before and behind its own place a query sees; -1 is all.
        k_lens: how many keys of each sample there are: ints, one int, or a tensor `[B]`.
        bias: added to the scores, or what is seen, `[.., Lq, Lk]`.

    Returns:
        `[B, Lq, H, Dv]`.
    """
    q_tokens, left, right = q.shape[1], int(window[0]), int(window[1])
    if k_lens is not None and not isinstance(k_lens, torch.Tensor):
        k, v, k_lens = _cut(k, v, k_lens)
    if causal:
        right = 0
    square = left < 0 and right == 0 and k_lens is None and bias is None
    plain_causal = square and q_tokens == k.shape[1] and q_tokens != 1
    mask = bias
    if not plain_causal and not (square and q_tokens == 1):
        seen = _seen(q_tokens, k.shape[1], left, right, k_lens, q.device)
        if seen is not None:
            mask = seen if bias is None else _both(bias, seen)
    options: dict[str, Any] = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    if scale is not None:
        options["scale"] = scale
    if mask is not None:
        options["attn_mask"] = mask
    if plain_causal:
        options["is_causal"] = True
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options
    )
    return out.transpose(1, 2)


def attend_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ends: torch.Tensor,
    k_ends: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """Attend within sequences that lie behind each other, `[L, H, D]`.

    Args:
        q: queries of all sequences.
        k: their keys.
        v: their values.
        q_ends: `[N + 1]`, where each sequence of `q` starts, and the end.
        k_ends: the same of `k` and `v`.
        scale: as in `attend`.
        causal: as in `attend`, within each sequence.
        window: as in `attend`, within each sequence.
    """
    q_of, q_at, q_len = _places(q.shape[0], q_ends)
    k_of, k_at, k_len = _places(k.shape[0], k_ends)
    seen = q_of[:, None] == k_of
    left, right = int(window[0]), 0 if causal else int(window[1])
    own = (q_at + k_len[q_of] - q_len[q_of])[:, None]
    if right >= 0:
        seen = seen & (k_at <= own + right)
    if left >= 0:
        seen = seen & (k_at >= own - left)
    return attend(q[None], k[None], v[None], scale=scale, bias=seen)[0]


def _cut(k: torch.Tensor, v: torch.Tensor, k_lens: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Leave keys out that no sample has; what is left to mask are lengths that differ."""
    k_lens = plain(k_lens)
    lengths = [k_lens] * k.shape[0] if isinstance(k_lens, int) else list(k_lens)
    longest = max(lengths)
    if longest != k.shape[1]:
        k, v = k[:, :longest], v[:, :longest]
    if all(one == longest for one in lengths):
        return k, v, None
    return k, v, torch.tensor(lengths, device=k.device)


def _seen(
    q_tokens: int,
    k_tokens: int,
    left: int,
    right: int,
    k_lens: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor | None:
    """Return which keys a query sees, `[Lq, Lk]` or `[B, 1, 1 or Lq, Lk]`, or None for all."""
    if left < 0 and right < 0 and k_lens is None:
        return None
    key = torch.arange(k_tokens, device=device)
    there = k_tokens if k_lens is None else k_lens.to(device).view(-1, 1, 1, 1)
    own = torch.arange(q_tokens, device=device)[:, None] + there - q_tokens
    seen = key < there if k_lens is not None else None
    if right >= 0:
        near = key <= own + right
        seen = near if seen is None else seen & near
    if left >= 0:
        near = key >= own - left
        seen = near if seen is None else seen & near
    return seen


def _both(bias: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    if bias.dtype == torch.bool:
        return bias & seen
    return bias.masked_fill(~seen, float("-inf"))


def _places(tokens: int, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sequence of each token, its place there, and the length of each sequence."""
    ends = ends.long()
    at = torch.arange(tokens, device=ends.device)
    # tokens behind the last end belong to a sequence of their own, which nobody reads
    starts = F.pad(ends, (0, 1), value=tokens)
    of = torch.bucketize(at, ends[1:], right=True)
    return of, at - starts[of], starts[1:] - starts[:-1]
