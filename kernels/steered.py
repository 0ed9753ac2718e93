"""Attend while a prompt changes: keys weigh differently for each latent of the queries.

A change that goes on within a chunk adds a row of scores for each of its latents. Latents then
stand side by side as a batch does, each with a row of its own, and no mask of queries and keys is
made. Outside of a change nothing is added at all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels import registry
from lipass.kernels.autocast import in_given_dtypes
from lipass.kernels.estimate import capturing
from lipass.kernels.token_major import token_major

_library = torch.library.Library("lipass", "FRAGMENT")
_library.define(
    "attend_steered(Tensor q, Tensor k, Tensor v, Tensor bias, float? scale=None) -> Tensor"
)


def added(bias: Tensor) -> Tensor | None:
    """Return what `lipass::steering_bias` has said in a form that is as cheap as it can be.

    Args:
        bias: `[1, 1, T, Lk]`, a row for each latent of the queries.

    Returns:
        None where nobody weighs anything; `[1, 1, 1, Lk]` where all latents have one row; else
        all rows. What is captured to run again may be told anything, so it takes all rows.
    """
    if capturing():
        return bias
    if registry.answer_of("steering_bias") is None:
        return None
    return bias if registry.answer_of("steering_ramps") is not None else bias[:, :, :1]


def attend_by_latent(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """Attend with a row of scores for each latent.

    Args:
        q: queries `[B, H, T * P, D]`, latent by latent.
        k: keys `[B, H, Lk, D]`.
        v: values like `k`.
        bias: `[B or 1, 1, T, Lk]`.
        scale: softmax scale; by default `D ** -0.5`.

    Returns:
        Output like `q`.
    """
    batch, latents = q.shape[0], bias.shape[2]
    rows = q.unflatten(2, (latents, -1)).transpose(1, 2).flatten(0, 1)
    keys, values = (x[:, None].expand(-1, latents, -1, -1, -1).flatten(0, 1) for x in (k, v))
    mask = _taken(bias, q).expand(batch, -1, -1, -1).transpose(1, 2).flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    return out.unflatten(0, (batch, latents)).transpose(1, 2).flatten(2, 3)


def _taken(bias: Tensor, q: Tensor) -> Tensor:
    """Give a bias the dtype of the queries where SDPA takes no other: on a CPU it takes fp32."""
    return bias.float() if q.device.type == "cpu" else bias.to(q.dtype)


def _attend_steered(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None
) -> Tensor:
    """Attend as `scaled_dot_product_attention` does, with what a session adds to scores."""
    rows = added(bias)
    if rows is not None and rows.shape[2] > 1:
        return token_major(attend_by_latent(q, k, v, rows, scale))
    row = None if rows is None else _taken(rows, q)
    return token_major(F.scaled_dot_product_attention(q, k, v, attn_mask=row, scale=scale))


def _attend_steered_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None
) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)


_library.impl("attend_steered", in_given_dtypes(_attend_steered), "CompositeExplicitAutograd")
torch.library.register_fake("lipass::attend_steered", _attend_steered_fake, lib=_library)
