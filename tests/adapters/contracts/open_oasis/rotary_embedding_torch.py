"""Turn queries and keys by their places; a table is kept, and its length is a tensor."""

import torch
from torch import nn


def apply_rotary_emb(freqs, t):
    width = freqs.shape[-1]
    turned, rest = t[..., :width], t[..., width:]
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    other = torch.stack((-b, a), -1).flatten(-2)
    return torch.cat([turned * freqs.cos() + other * freqs.sin(), rest], -1)


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, freqs_for="lang", max_freq=10, cache_if_possible=True, rows=8192):
        super().__init__()
        self.freqs_for, self.cache_if_possible, self.rows = freqs_for, cache_if_possible, rows
        pixels = torch.linspace(1.0, max_freq / 2, dim // 2) * torch.pi
        words = 1e4 ** -(torch.arange(0, dim, 2).float() / dim)
        freqs = pixels if freqs_for == "pixel" else words
        self.freqs = nn.Parameter(freqs, requires_grad=False)
        self.register_buffer("cached_freqs", torch.zeros(rows, dim), persistent=False)
        self.register_buffer("cached_freqs_seq_len", torch.tensor(0), persistent=False)

    def rotate_queries_or_keys(self, t, freqs):
        length = t.shape[-2]
        return apply_rotary_emb(self.forward(torch.arange(length).to(t), freqs, length), t)

    def get_axial_freqs(self, *dims):
        axes = []
        for i, dim in enumerate(dims):
            places = torch.linspace(-1, 1, steps=dim, device=self.freqs.device)
            shape = [1] * len(dims)
            shape[i] = dim
            axes.append(self.forward(places, self.freqs, dim).view(*shape, -1).expand(*dims, -1))
        return torch.cat(axes, -1)

    @torch.autocast("cuda", enabled=False)
    def forward(self, t, freqs, seq_len=None):
        may_keep = self.cache_if_possible and self.freqs_for != "pixel" and seq_len <= self.rows
        if may_keep and seq_len <= self.cached_freqs_seq_len.item():
            return self.cached_freqs[:seq_len].detach()
        made = torch.outer(t.type(freqs.dtype), freqs).repeat_interleave(2, dim=-1)
        if may_keep:
            self.cached_freqs[:seq_len] = made.detach()
            self.cached_freqs_seq_len.copy_(seq_len)
        return made
