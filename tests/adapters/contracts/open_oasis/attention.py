"""Attention along one axis at a time: over the places of a frame, then over frames at a place."""

import torch.nn.functional as F
from einops import rearrange
from rotary_embedding_torch import apply_rotary_emb
from torch import nn


class TemporalAxialAttention(nn.Module):
    def __init__(self, dim, heads, dim_head, rotary_emb, is_causal=True):
        super().__init__()
        self.heads, self.is_causal, self.rotary_emb = heads, is_causal, rotary_emb
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x):
        B, _, H, W, _ = x.shape
        q, k, v = (
            rearrange(one, "B T H W (h d) -> (B H W) h T d", h=self.heads)
            for one in self.to_qkv(x).chunk(3, dim=-1)
        )
        freqs = self.rotary_emb.freqs
        q, k = (self.rotary_emb.rotate_queries_or_keys(one, freqs) for one in (q, k))
        q, k, v = (one.contiguous() for one in (q, k, v))
        x = F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=self.is_causal)
        return self.to_out(rearrange(x, "(B H W) h T d -> B T H W (h d)", B=B, H=H, W=W))


class SpatialAxialAttention(nn.Module):
    def __init__(self, dim, heads, dim_head, rotary_emb):
        super().__init__()
        self.heads, self.rotary_emb = heads, rotary_emb
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x):
        B, T, H, W, _ = x.shape
        q, k, v = (
            rearrange(one, "B T H W (h d) -> (B T) h H W d", h=self.heads)
            for one in self.to_qkv(x).chunk(3, dim=-1)
        )
        freqs = self.rotary_emb.get_axial_freqs(H, W)
        q, k = (apply_rotary_emb(freqs, one) for one in (q, k))
        q, k, v = (
            rearrange(one, "(B T) h H W d -> (B T) h (H W) d", B=B, T=T, h=self.heads)
            for one in (q, k, v)
        )
        x = F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=False)
        return self.to_out(rearrange(x, "(B T) h (H W) d -> B T H W (h d)", B=B, H=H, W=W))
