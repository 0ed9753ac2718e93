"""A decode model in miniature, what it is called with, and how it is compiled without waiting."""

import torch
from torch import nn
from torch.nn import functional as F

import lipass

SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.0)
# Every chunk with a history may reuse, and the compiled model answers.
REUSE = {"steps.overlap_min": 0.0, "steps.form": "lookup"}


class Mini(nn.Module):
    """4 latents of 4x4 tokens; keys are text, history and own tokens."""

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.heads = heads
        self.embed, self.time = nn.Linear(4, width), nn.Linear(1, width)
        self.camera, self.qkv = nn.Linear(12, width), nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, 4)

    def forward(self, x, sigma, w2c, text, history):
        b, _, t, y, xx = x.shape
        h = self.embed(x.permute(0, 2, 3, 4, 1)).flatten(1, 3)
        h = h + self.time(sigma.view(-1, 1))[:, None]
        rows = self.camera(w2c[:, -t:, :3].flatten(2))[:, :, None]
        h = (h.unflatten(1, (t, -1)) + rows).flatten(1, 2)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        keys, values = torch.cat([text, history, k], 2), torch.cat([text, history, v], 2)
        h = h + F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
        return self.head(h).view(b, t, y, xx, 4).permute(0, 4, 1, 2, 3)


def cameras(n, batch=1):
    w2c = torch.eye(4).repeat(batch, n, 1, 1)
    w2c[:, :, 0, 3] = torch.arange(n) * 0.1
    return w2c


def inputs(history=2, batch=1, seed=0):
    """Return `x, w2c, text, history`."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, 4, 4, 4, generator=g),
        cameras(history + 4, batch),
        torch.randn(batch, 2, 6, 16, generator=g),
        torch.randn(batch, 2, history * 16, 16, generator=g),
    )


def compiled(model, preset="cache", **options):
    options = {"preset": preset, "inner": "eager", **options}
    return torch.compile(model, backend="light_interaction", options=options)


def level(sigma):
    return torch.tensor([float(sigma)])


def chunk(session, w2c, history=2, **given):
    return session.chunk(poses=w2c[0, :history], query=w2c[0, history:], **given)


def reusing(**options):
    return lipass.Session(preset="cache", **{**REUSE, **options})
