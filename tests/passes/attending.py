"""Attention in miniature over text, history and own latents, and found sites in words."""

import re

import torch
from torch.nn import functional as F

from lipass.passes.attention.site import sites

TEXT = "canonicalize,find-attention"
HISTORY = 8  # latents


def heads(tokens):
    """`[B, L, C]` to `[B, H, L, D]`."""
    return tokens.unflatten(-1, (2, 8)).transpose(1, 2)


def latents(frames=4):
    return torch.randn(1, 16, frames, 4, 4)


def kv(tokens, h=2):
    return torch.randn(1, h, tokens, 8)


def attend(x, *keys, key_dim=2, **options):
    """Attend from latents `[B, C, T, Y, X]` to other keys and their own."""
    q = heads(x.flatten(2).mT)
    key = torch.cat([*keys, q * 2], key_dim)
    value = torch.cat([*(k + 1 for k in keys), q * 3], key_dim)
    return F.scaled_dot_product_attention(q, key, value, **options)


def describe(gm):
    lines = []
    for _, site in sites(gm.graph):
        lines.append(f"{site.name}: {site.role}, {site.reason}; q {site.q_grid}")
        lines += [f"  {s.role} {tuple(map(str, s.grid))}: {s.why}" for s in site.segments]
    return re.sub(r"\bs\d+\b", "n", "\n".join(lines)).replace("'", "") + "\n"
