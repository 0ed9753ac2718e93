"""Tables of rotary positions, whose length is counted by `linspace`."""

import torch


def get_meshgrid_nd(start, *args, dim=2):
    axes = [torch.linspace(0, n, n + 1)[:n] for n in start]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def tables(length, dim):
    """Return cosines and sines `[length, dim]`."""
    (steps,) = get_meshgrid_nd([length], dim=1)
    angles = torch.outer(steps, 256 ** -(torch.arange(0, dim, 2) / dim)).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


def turned(x, cosines, sines):
    """Rotate pairs of `[B, T, H, D]`."""
    halves = x.unflatten(-1, (-1, 2))
    swapped = torch.stack([-halves[..., 1], halves[..., 0]], -1).flatten(-2)
    return x * cosines[:, None] + swapped * sines[:, None]
