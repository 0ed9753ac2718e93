"""Rotary tables of a whole sequence; how long it is decides their form."""

import torch


def get_nd_rotary_pos_embed(dims, sizes, theta):
    grid = torch.meshgrid(*(torch.linspace(0, n, n + 1)[:n] for n in sizes), indexing="ij")
    angles = [
        torch.outer(places.reshape(-1), 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim))
        for dim, places in zip(dims, grid, strict=True)
    ]
    turned = torch.cat([one.repeat_interleave(2, 1) for one in angles], 1)
    return turned.cos(), turned.sin()


def apply_rotary_emb(x, cosine, sine):
    """Turn pairs of neighbours of `[B, L, H, D]`."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    crossed = torch.stack([-odd, even], -1).flatten(-2)
    return x * cosine[:, None] + crossed * sine[:, None]
