"""A model that splits its tokens over ranks by itself, and its heads in attention, as many do.

Tokens are computed on the rank that has them; in front of attention each rank exchanges a share of
its tokens for a share of the heads, and back behind it. Caches hold the heads of a rank.
"""

import torch
import torch.distributed as dist
from torch.nn import functional as F

from lipass.examples import own_model


def exchange(x, scatter, gather, by_list=False):
    """Give each rank a share of an axis of `[B, L, H, D]`, and get its share of another."""
    ranks = dist.get_world_size()
    shares = [one.contiguous() for one in x.chunk(ranks, scatter)]
    if by_list:
        got = [torch.empty_like(one) for one in shares]
        dist.all_to_all(got, shares)
        return torch.cat(got, gather)
    out = torch.empty_like(torch.stack(shares))
    dist.all_to_all_single(out, torch.stack(shares))
    return torch.cat(out.unbind(0), gather)


class Block(own_model.Block):
    by_list = False

    def forward(self, x, cache):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (exchange(one, 2, 1, self.by_list).transpose(1, 2) for one in qkv)
        keys, values = k, v
        if cache is not None:
            keys, values = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        attended = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2)
        x = x + self.out(exchange(attended, 1, 2, self.by_list).flatten(2))
        return x + self.narrow(F.gelu(self.wide(x))), (k, v)


class World(own_model.World):
    """The example's model, split."""

    def __init__(self, width=32, heads=4, depth=2):
        super().__init__(width, heads, depth)
        for block in self.blocks:
            block.__class__ = Block

    def forward(self, latents, sigma, w2c, caches=None):
        frames, rows, columns = latents.shape[2:]
        x = self.embed(latents.permute(0, 2, 3, 4, 1)) + self.level(sigma.view(-1, 1, 1, 1, 1))
        x = (x + self.camera(w2c[:, :, :3].flatten(2))[:, :, None, None]).flatten(1, 3)
        x = x.chunk(dist.get_world_size(), 1)[dist.get_rank()]
        own = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x, pair = block(x, cache)
            own.append(pair)
        velocity = self.head(x).contiguous()
        parts = [torch.empty_like(velocity) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, velocity)
        velocity = torch.cat(parts, 1).unflatten(1, (frames, rows, columns))
        return velocity.permute(0, 4, 1, 2, 3), own
