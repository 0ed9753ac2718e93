"""Register `lipass::attend_pieces`: dense attention over keys in pieces, exact.

Which of its two forms runs is predicted for each call; see `lipass.kernels.dense`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels import cost, dense, registry
from lipass.kernels.autocast import in_given_dtypes
from lipass.kernels.block_sparse.api import unfit_heads
from lipass.kernels.block_sparse.kind import records
from lipass.kernels.token_major import empty_token_major

# Allowed for dispatching the operator and counting its call, beside an SDPA call that Inductor
# makes itself.
_OPERATOR_MS = 0.05

_library = torch.library.Library("lipass", "FRAGMENT")
_library.define("attend_pieces(Tensor q, Tensor[] k, Tensor[] v, float scale, str site) -> Tensor")


def attend_to_all(q: Tensor, k: list[Tensor], v: list[Tensor], scale: float) -> tuple[Tensor, str]:
    """Attend to every key, in whichever way is predicted to be faster here.

    Args:
        q: queries `[B, H, Lq, D]`.
        k: keys `[B, H, L, D]`, one tensor a piece; some may be empty, not all.
        v: values like `k`.
        scale: softmax scale.

    Returns:
        Output `[B, H, Lq, D]`, in memory `[B, Lq, H, D]`, and what ran: `native` or `sdpa`.
    """
    k, v = ([part for part in parts if part.shape[2]] for parts in (k, v))
    tokens = tuple([part.shape[2] for part in k])
    if dense.why_not_apart(q.device, q.dtype, tokens) is None and not records(q, *k, *v):
        found = _predict(q.shape, q.dtype, tokens)
        if found.apart_ms < found.joined_ms:
            return dense.attend_apart(q, k, v, scale), "native"
    return dense.attend_joined(q, k, v, scale), "sdpa"


def unfit_pieces(q: Tensor, k: list[Tensor], v: list[Tensor]) -> str | None:
    """Say how pieces of keys and values do not go with queries or each other, or return None."""
    if q.dim() != 4:
        return f"q must be [B, H, Lq, D], got {list(q.shape)}; reshape it"
    if why := unfit_heads("k", k, q) or unfit_heads("v", v, q):
        return why
    of_k, of_v = ([part.shape[2] for part in parts] for parts in (k, v))
    if of_k == of_v and of_k:
        return None
    return (
        f"k and v must have the same tokens piece by piece, got {of_k} and {of_v}; pass the "
        "values of these keys"
    )


def why_joined(
    q_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, tokens: tuple[int, ...]
) -> str | None:
    """Say why pieces of so many tokens should be joined by an inner compiler, or return None.

    It joins keys while it computes them, for less than a concatenation costs alone, and an
    operator of its own costs a call; so the gain has to be clear.
    """
    if len(tokens) < 2:
        return "its keys are one piece"
    if why := dense.why_not_apart(device, dtype, tokens):
        return why
    found = _predict(q_shape, dtype, tokens)
    if found.apart_ms + _OPERATOR_MS < found.joined_ms:
        return None
    return f"predicted {found.apart_ms:.2f} ms in pieces vs {found.joined_ms:.2f} ms joined"


def _predict(
    q_shape: tuple[int, ...], dtype: torch.dtype, tokens: tuple[int, ...]
) -> cost.Prediction:
    plan = dense.plan_of_all(*q_shape[:3], tokens)
    cpu = torch.device("cpu")
    return cost.predict(q_shape, dtype, cpu, plan.kv, plan.q_grid, plan.kv.blocks)


def _attend_pieces(q: Tensor, k: list[Tensor], v: list[Tensor], scale: float, site: str) -> Tensor:
    """Attend and count the call; arguments as in `attend_to_all`, and the site's name.

    Raises:
        ValueError: if keys or values do not go with the queries.
    """
    if why := unfit_pieces(q, k, v):
        raise ValueError(why)
    out, provider = attend_to_all(q, k, v, scale)
    pairs = q.shape[0] * q.shape[1]
    registry.record_call(
        registry.site_of_call(site),
        role="dense",
        provider=provider,
        visited=pairs,
        total=pairs,
        kept_dense="every key is visited",
    )
    return out


def _attend_pieces_fake(
    q: Tensor, k: list[Tensor], v: list[Tensor], scale: float, site: str
) -> Tensor:
    return empty_token_major(q)


_library.impl("attend_pieces", in_given_dtypes(_attend_pieces), "CompositeExplicitAutograd")
torch.library.register_fake("lipass::attend_pieces", _attend_pieces_fake, lib=_library)
