"""Attention that Dynamo is kept from seeing, as four functions that others import by name."""

import torch
import torch.nn.functional as F
from hyvideo.commons import maybe_fallback_attn_mode
from hyvideo.commons.infer_state import get_infer_state
from hyvideo.commons.parallel_states import get_parallel_state


def _softmax_over(q, k, v, mask=None):
    """Take `[B, H, L, D]`, return `[B, L, H * D]`."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@torch.compiler.disable
def attention(q, k, v, attn_mask=None, attn_mode="flash"):
    assert maybe_fallback_attn_mode(attn_mode) == "torch"
    mask = None
    if attn_mask is not None:
        seen = attn_mask.bool()
        mask = seen[:, None, :, None] & seen[:, None, None, :]
    return _softmax_over(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)


@torch.compiler.disable
def sequence_parallel_attention_txt(q, k, v, block_idx=None, cache_txt=False):
    assert not get_parallel_state().sp_enabled
    assert not get_infer_state().enable_sageattn
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _softmax_over(q, k, v), {"k_txt": k, "v_txt": v} if cache_txt else {}


@torch.compiler.disable
def sequence_parallel_attention_vision(q, k, v, block_idx=None, kv_cache=None, cache_vision=False):
    assert not get_parallel_state().sp_enabled
    assert not get_infer_state().enable_sageattn
    q, k, v = (torch.cat(streams).transpose(1, 2) for streams in (q, k, v))
    kept, own = kv_cache[block_idx], {"k_vision": k, "v_vision": v}
    if not cache_vision and kept["k_vision"] is not None:
        k, v = torch.cat([kept["k_vision"], k], 2), torch.cat([kept["v_vision"], v], 2)
    k = torch.cat([kept["k_txt"].repeat(2, 1, 1, 1), k], 2)
    v = torch.cat([kept["v_txt"].repeat(2, 1, 1, 1), v], 2)
    rotary, projective = _softmax_over(q, k, v).chunk(2)
    return rotary, projective, own if cache_vision else {}


@torch.compiler.disable
def parallel_attention(q, k, v, attn_mode=None):
    q, k, v = (torch.cat(parts, 1).transpose(1, 2) for parts in (q, k, v))
    return _softmax_over(q, k, v)
