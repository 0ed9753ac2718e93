"""Attention that runs on a GPU only, in sequences packed behind each other."""

import torch


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
    """Attend from `[B, Lq, H, D]`; of each sample `k_lens` keys count."""
    assert q.device.type == "cuda"
    import flash_attn

    lengths = torch.full((len(q),), q.shape[1], dtype=torch.int32)
    k = torch.cat([one[:n] for one, n in zip(k, k_lens, strict=True)])
    v = torch.cat([one[:n] for one, n in zip(v, k_lens, strict=True)])
    ends = [torch.cat([n.new_zeros(1), n]).cumsum(0) for n in (lengths, k_lens)]
    out = flash_attn.flash_attn_varlen_func(
        q.flatten(0, 1).to(dtype), k, v, *ends, q.shape[1], int(k_lens.max())
    )
    return out.unflatten(0, q.shape[:2]).type(q.dtype)
