"""Parts that the transformer with a cache and the one without share."""

import torch
from torch import nn

from .attention import flash_attention


def rope_params(length, dim):
    """Return complex rotations `[length, dim / 2]` in double precision."""
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(length), rates)
    return torch.polar(torch.ones_like(angles), angles)


def sinusoidal(dim, position):
    """Embed positions in double precision."""
    rates = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.outer(position.double(), rates.to(position.device))
    return torch.cat([angles.cos(), angles.sin()], 1)


class RMSNorm(nn.Module):
    """Normalise all heads of a token together."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        """Normalise in single precision."""
        full = x.float()
        return (full * (full.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).type_as(
            x
        ) * self.weight


class CrossAttention(nn.Module):
    """Attend to a prompt, whose keys are computed once a rollout."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x, context, context_lens, crossattn_cache=None):
        """Read the keys of the cache, or fill it."""
        q = self._heads(self.norm_q(self.q(x)))
        if crossattn_cache is not None and crossattn_cache["is_init"]:
            k, v = crossattn_cache["k"], crossattn_cache["v"]
        else:
            k, v = self._heads(self.norm_k(self.k(context))), self._heads(self.v(context))
            if crossattn_cache is not None:
                crossattn_cache["is_init"] = True
                crossattn_cache["k"], crossattn_cache["v"] = k, v
        return self.o(flash_attention(q, k, v, k_lens=context_lens).flatten(2))

    def _heads(self, x):
        return x.unflatten(2, (self.num_heads, -1))
