"""Attention that asks for a GPU, and what falls back to torch in half precision without one."""

import torch
import torch.nn.functional as F

try:
    import flash_attn

    FLASH_ATTN_2_AVAILABLE = True
except ModuleNotFoundError:
    FLASH_ATTN_2_AVAILABLE = False


def flash_attention(
    q,
    k,
    v,
    q_lens=None,
    k_lens=None,
    dropout_p=0.0,
    softmax_scale=None,
    q_scale=None,
    causal=False,
    window_size=(-1, -1),
    deterministic=False,
    dtype=torch.bfloat16,
    version=None,
):
    assert q.device.type == "cuda"
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * q.shape[1]
    packed = (x.to(dtype).flatten(0, 1) for x in (q, k, v))
    out = flash_attn.flash_attn_varlen_func(*packed, starts, starts, q.shape[1], k.shape[1])
    return out.unflatten(0, q.shape[:2]).to(q.dtype)


def attention(
    q,
    k,
    v,
    q_lens=None,
    k_lens=None,
    dropout_p=0.0,
    softmax_scale=None,
    q_scale=None,
    causal=False,
    window_size=(-1, -1),
    deterministic=False,
    dtype=torch.bfloat16,
    fa_version=None,
):
    if FLASH_ATTN_2_AVAILABLE:
        return flash_attention(q, k, v, causal=causal)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
