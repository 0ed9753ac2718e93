"""Quality in dB: same-index frames, raw tensors, errors averaged before the logarithm."""

import torch
from torch import Tensor

from .camera import invert

_CAP_DB = 100.0


def psnr_db(x: Tensor, y: Tensor) -> float:
    """PSNR of two equally shaped tensors in 0..1; equal ones give 100."""
    error = float((x - y).square().mean())
    return _CAP_DB if error == 0 else min(_CAP_DB, -10 * torch.log10(torch.tensor(error)).item())


def affected_psnr_db(x: Tensor, y: Tensor, chunk: int) -> float:
    """PSNR over those chunks of frames `[F, ...]` that differ at all; 100 where none does."""
    pairs = zip(x.split(chunk), y.split(chunk), strict=True)
    differing = [(a, b) for a, b in pairs if not torch.equal(a, b)]
    if not differing:
        return _CAP_DB
    return psnr_db(torch.cat([a for a, _ in differing]), torch.cat([b for _, b in differing]))


def revisits(w2c: Tensor, first_generated: int, gap: int = 8) -> list[tuple[int, int]]:
    """Pairs (earlier, generated) of latents that look from the same place the same way.

    Same: within 2 cm and half a degree, at least `gap` latents apart; the closest earlier view of
    each generated one.
    """
    c2w = invert(w2c)
    near = (c2w[:, None, :3, 3] - c2w[None, :, :3, 3]).norm(dim=-1) < 0.02
    turn = (c2w[:, None, :3, 2] * c2w[None, :, :3, 2]).sum(-1).clamp(-1, 1)
    same = near & (turn > torch.cos(torch.deg2rad(torch.tensor(0.5))))
    pairs = []
    for j in range(first_generated, len(w2c)):
        earlier = [i for i in range(j - gap + 1) if same[i, j]]
        if earlier:
            pairs.append((earlier[0], j))
    return pairs


def self_consistency_db(frames: Tensor, w2c: Tensor, first_generated: int) -> float | None:
    """PSNR between a place and its revisit within one video; None where nothing is revisited."""
    pairs = revisits(w2c, first_generated)
    if not pairs:
        return None
    first, again = zip(*pairs, strict=True)
    return psnr_db(frames[list(first)], frames[list(again)])
