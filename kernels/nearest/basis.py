"""Find the directions in which the keys of a head differ most: the planes that cut them.

Random planes, as locality-sensitive hashing draws them, cut keys of trained models badly: few
directions hold most of what attention tells apart.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

AXES_MAX = 16
"""More directions than a tree over a history has levels are not cut along."""
# Keys that directions are estimated from, and rounds of the iteration that finds them.
_SAMPLED, _ROUNDS = 4096, 8


def basis_of(keys: Tensor, axes: int, seed: int, first: int) -> Tensor:
    """Return the main directions of keys around their mean, `[B, H, D, axes]` fp32.

    Each is as long as keys vary along it. They are found by a fixed number of products, without
    reading a device: `eigh` would wait for one.

    Args:
        keys: `[B, H, L, D]`.
        axes: how many directions, at most `D`.
        seed: of the directions that the iteration starts from.
        first: leading keys that do not count.
    """
    batch, heads, tokens, dim = keys.shape
    axes = min(axes, dim)
    # An odd step, as an even one could see some columns of a latent only.
    step = max(tokens - first, 0) // _SAMPLED | 1
    sample = keys[:, :, first::step].float()
    if sample.shape[2] == 0:
        return keys.new_zeros(batch, heads, dim, axes, dtype=torch.float32)
    sample = sample - sample.mean(2, keepdim=True)
    spread = sample.mT @ sample / sample.shape[2]
    found = _start(heads, dim, axes, seed, keys.device).expand(batch, -1, -1, -1)
    for _ in range(_ROUNDS):
        found = _orthonormal(spread @ found)
    length = (found * (spread @ found)).sum(2, keepdim=True).clamp(min=0.0).sqrt()
    return (found * length).nan_to_num(0.0, 0.0, 0.0)


def _orthonormal(x: Tensor) -> Tensor:
    """Make columns orthonormal; where they depend on each other NaN may come, and no error."""
    gram = x.mT @ x
    axes = torch.arange(gram.shape[-1], device=x.device)
    gram[..., axes, axes] *= 1 + 1e-6
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(factor, x.mT, upper=False).mT


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _start(heads: int, dim: int, axes: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = heads, dim, axes
    drawn = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    return drawn.to(device)


def along(x: Tensor, basis: Tensor) -> Tensor:
    """Return how far vectors `[B, H, L, D]` reach along a basis, `[B, H, L, axes]` fp32."""
    return (x.float() @ basis).nan_to_num()
