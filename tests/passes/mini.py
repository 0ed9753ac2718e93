"""A world model in miniature and the tensors of one chunk."""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

SIGMAS = (1.0, 0.9, 0.6, 0.0)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, text, history):
        b, tokens, width = x.shape
        qkv = self.qkv(F.layer_norm(x, (width,)))
        q, k, v = qkv.view(b, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        parts = [text, (k, v)] if history is None else [text, history, (k, v)]
        key = torch.cat([part[0] for part in parts], dim=-2)
        value = torch.cat([part[1] for part in parts], dim=-2)
        out = F.scaled_dot_product_attention(query=q, key=key, value=value, dropout_p=0.0)
        return x + self.out(out.transpose(1, 2).reshape(b, tokens, width)), (k, v)


class Mini(nn.Module):
    """TinyWorld's shape: 2 blocks, width 32, 2 heads, 4x4 tokens a latent, 6 text tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4 + 12 + 1, 32)
        self.blocks = nn.ModuleList(Block(32, 2) for _ in range(2))
        self.head = nn.Linear(32, 4)

    def forward(self, latents, sigma, w2c, text, history=None):
        b, c, f, y, x = latents.shape
        n = w2c.shape[1] - 4
        own = w2c[:, :n] if history is None else w2c[:, n:]
        rows = torch.cat([own[:, :, :3].flatten(2), sigma[:, :, None]], -1)
        rows = rows[:, :, None, None].expand(b, f, y, x, 13)
        h = self.embed(torch.cat([latents.permute(0, 2, 3, 4, 1), rows], -1)).flatten(1, 3)
        cache = []
        for i, block in enumerate(self.blocks):
            h, key_value = self.layer(block, h, text[i], None if history is None else history[i])
            cache.append(key_value)
        if history is None:
            return cache
        return self.head(h).view(b, f, y, x, c).permute(0, 4, 1, 2, 3)

    def layer(self, block, h, text, history):
        return block(h, text, history)

    def chunk(self, context, x, w2c, text, sigmas):
        b, _, n = context.shape[:3]
        history = self(context, context.new_zeros(b, n), w2c, text)
        for sigma, sigma_next in itertools.pairwise(sigmas):
            level = torch.full((b, x.shape[2]), sigma)
            x = x + (sigma_next - sigma) * self(x, level, w2c, text, history)
        return x


class Inputs:
    """Tensors of one chunk with `n` history latents."""

    def __init__(self, n):
        generator = torch.Generator().manual_seed(n)

        def draw(*shape):
            return torch.randn(shape, generator=generator)

        self.n = n
        self.context = draw(1, 4, n, 4, 4)
        self.noise = draw(1, 4, 4, 4, 4)
        self.text = [(draw(1, 2, 6, 16), draw(1, 2, 6, 16)) for _ in range(2)]
        self.history = [(draw(1, 2, n * 16, 16), draw(1, 2, n * 16, 16)) for _ in range(2)]
        self.w2c = torch.eye(4).repeat(1, n + 4, 1, 1)
        self.w2c[0, :, 0, 3] = torch.linspace(0, 3, n + 4)
        self.clean, self.level = torch.zeros(1, n), torch.full((1, 4), 0.9)

    @property
    def prefill(self):
        return self.context, self.clean, self.w2c, self.text

    @property
    def decode(self):
        return self.noise, self.level, self.w2c, self.text, self.history

    @property
    def chunk(self):
        return self.context, self.noise, self.w2c, self.text, SIGMAS
