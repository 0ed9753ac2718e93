"""Check the arguments of block-sparse attention and send the call to a provider."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipass.kernels import registry
from lipass.kernels.autocast import in_given_dtypes
from lipass.kernels.block_sparse import in_order
from lipass.kernels.block_sparse.kind import Asking
from lipass.kernels.block_sparse.reference import merge_partials
from lipass.kernels.plan import BlockPlan

__all__ = ["block_sparse_attention", "merge_partials"]


@in_given_dtypes
def block_sparse_attention(
    q: Tensor,
    k: Tensor | Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    provider: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend each query block to the tokens of the key blocks that it visits.

    Args:
        q: queries `[B, H, Lq, D]`, row-major token order, any strides.
        k: keys `[B, H, Lk, D]`, or one tensor per segment of the plan.
        v: values like `k`.
        plan: which key blocks each query block visits. Never read back to the host.
        scale: factor on the scores; by default `D ** -0.5`.
        key_bias: added to the scores of each key, `[B or 1, Lk]` or `[B or 1, H or 1, Lk]` fp32
            (log m for m merged keys).
        return_lse: also return the log-sum-exp of the scores, for `merge_partials`.
        provider: implementation to use; by default the best that takes the call.

    Returns:
        Output `[B, H, Lq, D]` in `q.dtype`, in memory `[B, Lq, H, D]`; with `return_lse` also the
        log-sum-exp `[B, H, Lq]` fp32, base e. A query that sees no key gives 0 and `-inf`.

    Raises:
        ValueError: if shapes or dtypes do not fit the plan, or the provider refuses.
    """
    keys = [k] if isinstance(k, Tensor) else list(k)
    values = [v] if isinstance(v, Tensor) else list(v)
    if not torch.compiler.is_compiling():
        reason = _unfit(q, keys, values, plan, key_bias)
        if reason:
            raise ValueError(reason)
    biased = key_bias is not None or plan.key_keep is not None
    asking = Asking(q, keys, values, plan.q_grid, plan.kv, biased, key_bias)
    chosen = registry.choose("block_sparse", q.device, provider, asking, asking.measured)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if key_bias is not None and key_bias.dim() == 2:
        key_bias = key_bias[:, None]
    out, lse = in_order.attend(
        chosen.module, q, keys, values, plan, scale=scale, key_bias=key_bias,
        return_lse=return_lse, laid=asking.laid,
    )  # fmt: skip
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _unfit(
    q: Tensor, keys: list[Tensor], values: list[Tensor], plan: BlockPlan, key_bias: Tensor | None
) -> str | None:
    """Name the first rule that a call breaks."""
    if q.dim() != 4 or q.shape[2] != plan.q_grid.tokens:
        return (
            f"q must be [B, H, {plan.q_grid.tokens}, D] for grid {plan.q_grid.grid}, got "
            f"{list(q.shape)}; build the plan for these queries"
        )
    expected = plan.segment_tokens
    for name, parts in (("k", keys), ("v", values)):
        tokens = [part.shape[2] for part in parts]
        if tokens != expected and tokens != [sum(expected)]:
            return (
                f"{name} must have {expected} tokens by segment or {sum(expected)} in one tensor, "
                f"got {tokens}; build the plan for these keys"
            )
        if {part.dtype for part in parts} != {q.dtype}:
            return f"q, k and v must have one dtype, got {q.dtype} and {parts[0].dtype}; cast them"
        if why := unfit_heads(name, parts, q):
            return why
    if plan.indices.shape[:3] != (q.shape[0], q.shape[1], plan.q_grid.blocks):
        return (
            f"the plan must be [B, H, Nq] = {[*q.shape[:2], plan.q_grid.blocks]}, got "
            f"{list(plan.indices.shape[:3])}; build it from these queries"
        )
    if key_bias is not None and (why := unfit_bias(key_bias, q, sum(expected))):
        return why
    return None


def unfit_heads(name: str, parts: list[Tensor], q: Tensor) -> str | None:
    """Say how keys or values do not go with queries `[B, H, Lq, D]`, or return None.

    Kernels go by the sizes of the queries, so others would be read past their end.
    """
    batch, heads, _, dim = q.shape
    for part in parts:
        shape = part.shape
        if len(shape) != 4 or (shape[0], shape[1], shape[3]) != (batch, heads, dim):
            return (
                f"{name} must have the batch, heads and head dim of q {list(q.shape)}, got "
                f"{list(shape)}; expand grouped or shared heads first"
            )
    return None


def unfit_bias(key_bias: Tensor, q: Tensor, keys: int) -> str | None:
    """Say how a bias does not fit queries `[B, H, Lq, D]` and so many keys, or return None."""
    *outer, last = key_bias.shape
    sizes = (q.shape[:1], q.shape[:2])[len(outer) == 2]
    fits = len(outer) in (1, 2) and all(n in (1, m) for n, m in zip(outer, sizes, strict=True))
    if fits and last == keys and key_bias.is_floating_point():
        return None
    return (
        f"key_bias must be [B or 1, L] or [B or 1, H or 1, L] of floats with B, H, L = "
        f"{q.shape[0]}, {q.shape[1]}, {keys}, got {list(key_bias.shape)} {key_bias.dtype}; give "
        "every key a value, 0 for none, and write a bias of each head as [1, H, L]"
    )
