"""Other ways to attend to the blocks of a plan, each as a call that can be timed.

A rival is given what it needs for nothing: keys in one tensor, a mask of its own form, tokens in
its own order. What is timed is its attention alone; our rows pool and select too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels import block_sparse_attention
from lipass.kernels.plan import BlockPlan

Call = Callable[[], object]
Rival = Callable[[BlockPlan], Call]

# SpargeAttn's blocks, queries and keys.
_SPARGE_BLOCK = (128, 64)
_WORKSPACE_BYTES = 128 * 1024 * 1024
# Of the largest mask of elements that is made; prefill of released models would need up to 32 GB.
_MASK_BYTES = 4 << 30


def rivals(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, Rival]:
    """Return those that can run here, by name; each takes a plan and returns a call.

    Args:
        q: queries `[B, H, Lq, D]`.
        k: keys `[B, H, Lk, D]`, all segments in one.
        v: values like `k`.
        scale: softmax scale.
    """
    found: dict[str, Rival] = {
        "mask": lambda plan: _mask(q, k, v, scale, plan),
        "flex": lambda plan: flex(q, k, v, scale, plan),
    }
    if q.device.type == "cpu":
        found["gather"] = lambda plan: (
            lambda: block_sparse_attention(q, k, v, plan, scale=scale, provider="gather")
        )
    if q.device.type == "cuda" and importlib.util.find_spec("flashinfer"):
        found["flashinfer"] = lambda plan: flashinfer(q, k, v, scale, plan)
    if q.device.type == "cuda" and importlib.util.find_spec("spas_sage_attn"):
        found["sparge"] = lambda plan: sparge(q, k, v, plan)
    return found


def _mask(q: Tensor, k: Tensor, v: Tensor, scale: float, plan: BlockPlan) -> Call:
    """Dense attention with a mask of elements.

    Raises:
        ValueError: if the mask would be larger than what is worth making.
    """
    size = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if size > _MASK_BYTES:
        raise ValueError(f"a mask of elements must fit {_MASK_BYTES} bytes, got {size}")
    mask = plan.to_dense_mask()
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float, plan: BlockPlan) -> Call:
    """FlexAttention, compiled, over the blocks of the plan.

    Its blocks are runs of tokens, so tokens are put into the slots of the tiles first; blocks that
    lack a token are partial to it.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    attend = torch.compile(flex_attention, dynamic=False)
    q_slots, k_slots = plan.q_grid.token_index(q.device), plan.kv.token_index(q.device)
    rows, keys, values = (
        x.index_select(2, slots.flatten().clamp(min=0)).contiguous()
        for x, slots in ((q, q_slots), (k, k_slots), (v, k_slots))
    )
    exists, visited, whole = k_slots.flatten() >= 0, plan.visited(), (k_slots >= 0).all(1)
    volumes = plan.q_grid.block_tokens, plan.kv.block_tokens

    def mask(b: Tensor, h: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        return visited[b, h, q_at // volumes[0], k_at // volumes[1]] & exists[k_at]

    blocks = BlockMask.from_kv_blocks(
        *_lists(visited & ~whole), *_lists(visited & whole),
        BLOCK_SIZE=volumes, mask_mod=mask,
        seq_lengths=(rows.shape[2], keys.shape[2]),
    )  # fmt: skip
    return lambda: attend(rows, keys, values, block_mask=blocks, scale=scale)


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Count the blocks of each row of a mask, and name them in front of the others."""
    order = mask.int().argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1).int(), order.int().contiguous()


def flashinfer(q: Tensor, k: Tensor, v: Tensor, scale: float, plan: BlockPlan) -> Call:
    """FlashInfer's variable block-sparse attention, with the heads of all items side by side.

    Its blocks are runs of tokens, so tokens are put in the order of the tiles first.
    """
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    pairs, dim = q.shape[0] * q.shape[1], q.shape[3]
    rows = _in_tiles(q.flatten(0, 1), plan.q_grid.token_index(q.device))
    keys, values = (_in_tiles(x.flatten(0, 1), plan.kv.token_index(q.device)) for x in (k, v))
    q_sizes = plan.q_grid.lengths(q.device).int().expand(pairs, -1).contiguous()
    k_sizes = (plan.kv.token_index(q.device) >= 0).sum(-1).int().expand(pairs, -1).contiguous()
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper: Any = VariableBlockSparseAttentionWrapper(workspace)
    wrapper.plan(
        block_mask_map=plan.visited().flatten(0, 1),
        block_row_sz=q_sizes,
        block_col_sz=k_sizes,
        num_qo_heads=pairs,
        num_kv_heads=pairs,
        head_dim=dim,
        sm_scale=scale,
        q_data_type=q.dtype,
    )
    return lambda: wrapper.run(rows, keys, values)


def sparge(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Call:
    """SpargeAttn's quantised attention with a block mask; its scale is `D ** -0.5`.

    Raises:
        ValueError: if the tiles are not its blocks, with every slot filled.
    """
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    volumes = (plan.q_grid.block_tokens, plan.kv.block_tokens)
    if volumes != (128, 128) or not (plan.q_grid.is_full and plan.kv.is_full):
        raise ValueError(f"SpargeAttn takes whole blocks of 128 tokens, got {volumes}")
    rows = _in_tiles(q, plan.q_grid.token_index(q.device))
    keys, values = (_in_tiles(x, plan.kv.token_index(q.device)) for x in (k, v))
    parts = volumes[1] // _SPARGE_BLOCK[1]
    mask = plan.visited().repeat_interleave(parts, -1).to(torch.int8)
    return lambda: block_sparse_sage2_attn_cuda(rows, keys, values, mask_id=mask)


def _in_tiles(x: Tensor, tokens: Tensor) -> Tensor:
    """Put tokens `[.., L, D]` in the order of the slots that hold one, `tokens` `[N, slots]`."""
    order = tokens.flatten()
    return x.index_select(-2, order[order >= 0]).contiguous()
