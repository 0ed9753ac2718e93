"""Attend to all keys of one piece or several: joined for SDPA, or read where they lie.

Models join text, history and current keys in front of each attention call. The compiled
block-sparse kernel reads segments where they lie, so with a plan that visits every block it is
dense attention without the copies.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels import registry
from lipass.kernels.block_sparse import native
from lipass.kernels.block_sparse.kind import Asking
from lipass.kernels.plan import ROLES, BlockGrid, BlockPlan, KvLayout, Segment
from lipass.kernels.token_major import token_major

PIECES_MAX = len(ROLES)
# As many keys as the compiled kernel takes at once (`kKeys`).
_BLOCK_TOKENS = 128
# Scores that `attend_plainly` holds at once.
_SCORES = 1 << 24


def attend_joined(q: Tensor, k: list[Tensor], v: list[Tensor], scale: float) -> Tensor:
    """Join keys and values `[B, H, L, D]` and call SDPA; the output is token-major."""
    key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in (k, v))
    return token_major(F.scaled_dot_product_attention(q, key, value, scale=scale))


def attend_apart(q: Tensor, k: list[Tensor], v: list[Tensor], scale: float) -> Tensor:
    """Read keys and values where they lie, with the compiled kernel; the output is token-major.

    Takes what `why_not_apart` does not refuse, and records no gradient.
    """
    plan = plan_of_all(*q.shape[:3], tuple([part.shape[2] for part in k]))
    out, _ = native.block_sparse_attention(q, k, v, plan, scale=scale, key_bias=None)
    return out


def attend_biased(
    q: Tensor, k: list[Tensor], v: list[Tensor], scale: float, bias: Tensor | None, *, lse: bool
) -> tuple[Tensor, Tensor | None, str]:
    """Attend to every key with a bias `[B or 1, H or 1, Lk]`, or where the log-sum-exp is needed.

    Returns:
        Token-major output, the log-sum-exp `[B, H, Lq]` fp32 or None, and what ran: a compiled
        kernel with a plan over all blocks, `sdpa`, or `plain`, in order of preference.
    """
    k, v = ([part for part in parts if part.shape[2]] for parts in (k, v))
    if len(k) > PIECES_MAX:
        k, v = [torch.cat(k, 2)], [torch.cat(v, 2)]
    tokens = tuple([part.shape[2] for part in k])
    if tokens and (chosen := _kernel_of_all(q, k, v, tokens, bias)) is not None:
        plan = plan_of_all(*q.shape[:3], tokens, q.device)
        out, log_sums = chosen.module.block_sparse_attention(
            q, k, v, plan, scale=scale, key_bias=bias, return_lse=lse
        )
        return out, log_sums if lse else None, chosen.name
    key, value = (torch.cat(parts, 2) if parts else q[:, :, :0] for parts in (k, v))
    shift = None if bias is None else bias.float()[:, :, None]
    # Only a CPU takes a mask that is more precise than the queries; log m in bf16 is 1 % off.
    if not lse and (q.dtype == torch.float32 or q.device.type == "cpu"):
        out = F.scaled_dot_product_attention(q, key, value, attn_mask=shift, scale=scale)
        return token_major(out), None, "sdpa"
    out, log_sums = attend_plainly(q, key, value, scale, shift)
    return out, log_sums if lse else None, "plain"


def _kernel_of_all(
    q: Tensor, k: list[Tensor], v: list[Tensor], tokens: tuple[int, ...], bias: Tensor | None
) -> registry.Choice | None:
    """Find a kernel that reads keys where they lie; gathering all of them is no gain."""
    plan = plan_of_all(*q.shape[:3], tokens, q.device)
    asking = Asking(q, k, v, plan.q_grid, plan.kv, bias is not None, bias)
    found = registry.find("block_sparse", q.device, asking, asking.measured)
    if isinstance(found, registry.Refused) or found.name in ("gather", "reference"):
        return None
    return found


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, scale: float, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend by products, softmax and sum in fp32, some queries at a time.

    Args:
        q: queries `[B, H, Lq, D]`.
        k: keys `[B, H, Lk, D]`.
        v: values like `k`.
        scale: softmax scale.
        shift: added to the scores, `[B or 1, H or 1, Lq or 1, Lk]` fp32, or None.

    Returns:
        Token-major output in `q.dtype`, and the log-sum-exp `[B, H, Lq]` fp32, base e. A query
        that sees no key gives 0 and `-inf`.
    """
    k, v = k.float(), v.float()
    step = max(_SCORES // max(math.prod(q.shape[:2]) * k.shape[2], 1), 1)
    outputs, log_sums = [], []
    for start in range(0, max(q.shape[2], 1), step):
        score = (q[:, :, start : start + step].float() @ k.mT) * scale
        if shift is not None:
            rows = slice(None) if shift.shape[2] == 1 else slice(start, start + step)
            score = score + shift[:, :, rows]
        most = score.amax(-1, keepdim=True) if score.shape[3] else score.new_zeros(1)
        most = most.masked_fill(most == -math.inf, 0.0)
        weight = (score - most).exp()
        # Not by the log-sum-exp: beside scores of `finfo(dtype).min` it cannot hold the sum.
        total = weight.sum(-1, keepdim=True)
        outputs.append((weight @ v / total.clamp(min=1.0)).to(q.dtype))
        log_sums.append((most + total.log())[..., 0])
    return token_major(torch.cat(outputs, 2)), torch.cat(log_sums, 2)


def why_not_apart(device: torch.device, dtype: torch.dtype, tokens: tuple[int, ...]) -> str | None:
    """Say why no kernel reads pieces of so many tokens where they lie, or return None."""
    if device.type != "cpu":
        return f"keys in pieces are read on a CPU only, got {device.type}"
    if dtype not in native.DTYPES:
        return f"keys in pieces are read in fp32, bf16 and fp16, got {dtype}"
    if not 1 <= len(tokens) <= PIECES_MAX:
        return f"its keys must be 1 to {PIECES_MAX} pieces, got {len(tokens)}"
    if min(tokens) == 0:
        return "one of its pieces is empty"
    return native.why_not_loaded()


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def plan_of_all(
    batch: int,
    heads: int,
    queries: int,
    tokens: tuple[int, ...],
    device: torch.device | None = None,
) -> BlockPlan:
    """Visit every block of pieces of so many tokens; the roles only number them."""
    assert len(tokens) <= PIECES_MAX, tokens
    tile = (1, 1, _BLOCK_TOKENS)
    layout = KvLayout(
        tuple(
            Segment(role, BlockGrid((1, 1, length), tile))
            for role, length in zip(ROLES, tokens, strict=False)
        )
    )
    q_grid = BlockGrid((1, 1, queries), tile)
    blocks = torch.arange(layout.blocks, dtype=torch.int32, device=device)
    indices = blocks.expand(batch, heads, q_grid.blocks, -1).contiguous()
    counts = torch.full(indices.shape[:-1], layout.blocks, dtype=torch.int32, device=device)
    segments = tuple(range(len(tokens)))
    return BlockPlan(indices, counts, q_grid, layout, uniform=True, shared_segments=segments)
