"""Denoise a frame against a ring of those before it: the loop is unrolled, the mask is data."""

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


class RingCache(nn.Module):
    """Keys and values of the latest frames, and behind them those of the frame itself."""

    def __init__(self, heads, frames, tokens, width):
        super().__init__()
        self.tokens, self.ring = tokens, frames * tokens
        self.kv = nn.Buffer(torch.zeros(2, 1, heads, self.ring + tokens, width))
        self.written = nn.Buffer(torch.arange(self.ring + tokens) >= self.ring)

    def upsert(self, kv, frame, frozen):
        places = torch.arange(self.tokens)
        self.kv.index_copy_(3, places + self.ring, kv)
        own = (frame * self.tokens) % self.ring + places
        seen = self.written.clone()
        seen[own] = False
        length = seen.numel()
        blocks = nn.functional.pad(seen, (0, -length % BLOCK)).view(-1, BLOCK)
        kinds = blocks.any(-1) & ~blocks.all(-1), blocks.all(-1)
        listed = []
        for kind in kinds:
            rows = kind[None, None, None].expand(1, 1, -(-self.tokens // BLOCK), -1)
            order = rows.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
            listed += [rows.sum(-1, dtype=torch.int32).contiguous(), order.to(torch.int32)]
        mask = BlockMask.from_kv_blocks(
            *listed, BLOCK_SIZE=BLOCK, mask_mod=lambda b, h, q, k: seen[k],
            seq_lengths=(self.tokens, length), compute_q_blocks=False,
        )  # fmt: skip
        if not frozen:
            self.kv.index_copy_(3, own, kv)
            self.written[own] = True
        return *self.kv.unbind(0), mask


class Attn(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, cache, frame, frozen):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        k, v, mask = cache.upsert(torch.stack([k, v]), frame, frozen)
        return self.out(flex_attention(q, k, v, block_mask=mask).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, dim=32, heads=2):
        super().__init__()
        self.patchify, self.unpatchify = nn.Conv2d(4, dim, 1), nn.Linear(dim, 4)
        self.attn = Attn(dim, heads)

    def forward(self, x, sigma, frame, cache, frozen):
        h = self.patchify(x).flatten(2).transpose(1, 2) + sigma
        h = h + self.attn(h, cache, frame, frozen)
        return self.unpatchify(h).transpose(1, 2).unflatten(2, x.shape[2:])


def denoise(model, x, frame, cache, sigmas):
    sigma = x.new_empty(1, 1, 1)
    for level, change in zip(sigmas, sigmas.diff(), strict=False):
        x = x + change * model(x, sigma.fill_(level), frame, cache, True)
    return x
