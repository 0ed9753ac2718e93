"""Attend to keys that lie in pieces, without joining them: exact, and the same op everywhere.

Models join text, history and current keys in front of each attention call; on a CPU those copies
are up to a third of the call. The compiled block-sparse kernel reads segments where they lie, so
with a plan that visits every block it is dense attention without the copies.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels import cost, registry
from lipass.kernels.block_sparse import native
from lipass.kernels.plan import ROLES, BlockGrid, BlockPlan, KvLayout, Segment

# Of 64, 128 and 256 tokens the one that is never slower than joining: 1.05x to 1.75x over
# concatenation and SDPA from 256 x 544 to 1,024 x 8,224 tokens, fp32 and bf16 (2 cores, AMX).
BLOCK_TOKENS = 128
PIECES_MAX = len(ROLES)
# Dispatching the operator, measured on 2 cores beside an SDPA call that Inductor makes itself.
_OPERATOR_MS = 0.1

_library = torch.library.Library("lipass", "FRAGMENT")
_library.define("attend_pieces(Tensor q, Tensor[] k, Tensor[] v, float scale, str site) -> Tensor")


def why_not(device: torch.device, dtype: torch.dtype, pieces: int) -> str | None:
    """Say why no kernel reads such keys in pieces, or return None."""
    if device.type != "cpu":
        return f"keys in pieces are read on a CPU only, got {device.type}"
    if dtype not in native.DTYPES:
        return f"keys in pieces are read in fp32, bf16 and fp16, got {dtype}"
    if not 2 <= pieces <= PIECES_MAX:
        return f"its keys must be 2 to {PIECES_MAX} pieces, got {pieces}"
    return None


def attend_to_all(q: Tensor, k: list[Tensor], v: list[Tensor], scale: float) -> tuple[Tensor, str]:
    """Attend to every key, in whichever way is predicted to be faster here.

    Args:
        q: queries `[B, H, Lq, D]`.
        k: keys `[B, H, L, D]`, one tensor a piece.
        v: values like `k`.
        scale: softmax scale.

    Returns:
        Output `[B, H, Lq, D]`, contiguous, and the name of what ran: `native` or `sdpa`.
    """
    if q.device.type == "cpu" and q.dtype in native.DTYPES and native.why_not_loaded() is None:
        rates = cost.cpu_rates(q.dtype, torch.get_num_threads(), "native")
        tokens = tuple([part.shape[2] for part in k])
        plan = _paying_plan(rates, tuple(q.shape), q.dtype, tokens)
        if plan is not None and native.why_not(q, plan) is None:
            out, _ = native.block_sparse_attention(q, k, v, plan, scale=scale, key_bias=None)
            return out, "native"
    key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in (k, v))
    return F.scaled_dot_product_attention(q, key, value, scale=scale).contiguous(), "sdpa"


@functools.lru_cache(maxsize=512)
def _paying_plan(
    rates: cost.Rates, q_shape: tuple[int, ...], dtype: torch.dtype, tokens: tuple[int, ...]
) -> BlockPlan | None:
    """Plan a call over all blocks if that is predicted to beat joining; once for each size."""
    if why_not(torch.device("cpu"), dtype, len(tokens)) is not None or min(tokens) == 0:
        return None
    batch, heads, queries, dim = q_shape
    plan = _plan(batch, heads, queries, tokens)
    apart, joined = cost.predict_pieces(rates, batch * heads, dim, dtype, plan.kv, plan.q_grid)
    return plan if apart < joined else None


def why_joined(
    q_shape: tuple[int, ...], tokens: tuple[int, ...], dtype: torch.dtype
) -> str | None:
    """Predict that a call of these sizes is faster with joined keys, or return None.

    An inner compiler joins keys for less than a concatenation costs alone, and an operator of its
    own costs a call; so the gain has to be clear. None also where the kernel cannot be had.
    """
    if native.why_not_loaded() is not None or min(tokens) == 0:
        return None
    batch, heads, queries, dim = q_shape
    plan = _plan(batch, heads, queries, tokens)
    rates = cost.cpu_rates(dtype, torch.get_num_threads(), "native")
    apart, joined = cost.predict_pieces(rates, batch * heads, dim, dtype, plan.kv, plan.q_grid)
    if apart + _OPERATOR_MS < joined:
        return None
    return f"predicted {apart:.2f} ms in pieces vs {joined:.2f} ms joined"


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _plan(batch: int, heads: int, queries: int, tokens: tuple[int, ...]) -> BlockPlan:
    """Visit every block; the roles only number the pieces."""
    tile = (1, 1, BLOCK_TOKENS)
    layout = KvLayout(
        tuple(
            Segment(role, BlockGrid((1, 1, length), tile))
            for role, length in zip(ROLES, tokens, strict=False)
        )
    )
    q_grid = BlockGrid((1, 1, queries), tile)
    blocks = torch.arange(layout.blocks, dtype=torch.int32)
    indices = blocks.expand(batch, heads, q_grid.blocks, -1).contiguous()
    counts = torch.full(indices.shape[:-1], layout.blocks, dtype=torch.int32)
    segments = tuple(range(len(tokens)))
    return BlockPlan(indices, counts, q_grid, layout, uniform=True, shared_segments=segments)


def _attend_pieces(q: Tensor, k: list[Tensor], v: list[Tensor], scale: float, site: str) -> Tensor:
    """Attend and count the call; arguments as in `attend_to_all`, and the site's name."""
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
    return q.new_empty(q.shape)


_library.impl("attend_pieces", _attend_pieces, "CompositeExplicitAutograd")
torch.library.register_fake("lipass::attend_pieces", _attend_pieces_fake, lib=_library)
