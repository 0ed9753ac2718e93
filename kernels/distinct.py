"""Register `lipass::distinct_keys` and `lipass::attend_distinct`: keys that are equal count once.

Prompts are padded to a fixed length with rows that stay alike through every projection: keys and
values that are the same to the bit. `m` of them weigh as much as one with `log m` added to its
score, for every query. Models are trained to attend to them, so leaving them out would be wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels import registry
from lipass.kernels.autocast import in_given_dtypes
from lipass.kernels.block_sparse.api import block_sparse_attention
from lipass.kernels.dense import plan_of_all
from lipass.kernels.token_major import empty_token_major, token_major

# Fewer equal keys are not worth a kernel of our own in place of SDPA.
_EQUAL_KEYS_MIN = 16

_library = torch.library.Library("lipass", "FRAGMENT")
_library.define("distinct_keys(Tensor k, Tensor v) -> Tensor")
_library.define(
    "attend_distinct(Tensor q, Tensor k, Tensor v, Tensor distinct, float scale, str site)"
    " -> Tensor"
)


def distinct_keys(k: Tensor, v: Tensor) -> Tensor:
    """Count the keys up to and including the first of a run of equal ones at the end.

    Args:
        k: keys `[B, H, L, D]`.
        v: values like `k`.

    Returns:
        Int64 scalar in 1..L: key `distinct - 1` and all behind it are equal in every batch item
        and head, and so are their values. L if only the last is.
    """
    same = [(x == x[:, :, -1:]).all(3).all(1).all(0) for x in (k, v)]
    # 1 up to the end of the run, counted from the back.
    run = (same[0] & same[1]).flip(0).cumprod(0).sum()
    return k.shape[2] - run.clamp(min=1) + 1


def attend_distinct(
    q: Tensor, k: Tensor, v: Tensor, distinct: int, scale: float
) -> tuple[Tensor, str]:
    """Attend to every key, those that are equal as one of their common weight.

    Args:
        q: queries `[B, H, Lq, D]`.
        k: keys `[B, H, L, D]`.
        v: values like `k`.
        distinct: result of `distinct_keys`.
        scale: softmax scale.

    Returns:
        Output `[B, H, Lq, D]`, in memory `[B, Lq, H, D]`, and what ran: `merged` or `sdpa`.
    """
    equal = k.shape[2] - distinct + 1
    if equal < _EQUAL_KEYS_MIN or q.device.type != "cpu":
        return token_major(F.scaled_dot_product_attention(q, k, v, scale=scale)), "sdpa"
    bias = torch.zeros(1, distinct, dtype=torch.float32)
    bias[0, -1] = math.log(equal)
    plan = plan_of_all(*q.shape[:3], (distinct,))
    out = block_sparse_attention(
        q, k[:, :, :distinct], v[:, :, :distinct], plan, scale=scale, key_bias=bias
    )
    assert isinstance(out, Tensor)
    return out, "merged"


def _attend_distinct(
    q: Tensor, k: Tensor, v: Tensor, distinct: Tensor, scale: float, site: str
) -> Tensor:
    keys = int(distinct)
    out, provider = attend_distinct(q, k, v, keys, scale)
    pairs = q.shape[0] * q.shape[1]
    merged = provider == "merged"
    few = f"fewer than {_EQUAL_KEYS_MIN} of its keys are equal"
    why = few if q.device.type == "cpu" else f"equal keys are merged on a CPU, got {q.device.type}"
    registry.record_call(
        registry.site_of_call(site),
        role="cross",
        provider=provider,
        visited=pairs * (keys if merged else k.shape[2]),
        total=pairs * k.shape[2],
        kept_dense="" if merged else why,
    )
    return out


_library.impl("distinct_keys", distinct_keys, "CompositeExplicitAutograd")
_library.impl("attend_distinct", in_given_dtypes(_attend_distinct), "CompositeExplicitAutograd")


@torch.library.register_fake("lipass::distinct_keys", lib=_library)
def _distinct_keys_fake(k: Tensor, v: Tensor) -> Tensor:
    return k.new_empty((), dtype=torch.int64)


@torch.library.register_fake("lipass::attend_distinct", lib=_library)
def _attend_distinct_fake(
    q: Tensor, k: Tensor, v: Tensor, distinct: Tensor, scale: float, site: str
) -> Tensor:
    return empty_token_major(q)
