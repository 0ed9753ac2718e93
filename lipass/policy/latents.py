"""Check the history latents that a chunk is given, and read what is decided by: two numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_WANTED = "pass the history latents [M, ...], oldest first, or None"


class LatentReading(NamedTuple):
    """What the latest latents say.

    Attributes:
        dynamics: `D = MSE(z[t-1], z[t-2])` of the two latest chunks; None with less than two.
        power: mean square of the latest chunk, 1 for normalised latents; None without any.
    """

    dynamics: float | None = None
    power: float | None = None


def check_latents(latents: object) -> None:
    """Refuse what is no history; values are not read.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: no entry a latent, or no values.
    """
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        remedy = "torch.from_numpy makes one of an array" if kind == "ndarray" else _WANTED
        raise TypeError(f"latents must be a floating-point tensor, got {kind}; {remedy}")
    if latents.dim() < 2 or (len(latents) and not latents[0].numel()):
        raise ValueError(
            f"latents must have shape [M, ...], an entry a latent, got {list(latents.shape)}; "
            f"{_WANTED}"
        )
    if latents.device.type == "meta":
        raise ValueError(f"latents must hold values, got a tensor on device meta; {_WANTED}")


def read_latents(latents: Tensor | None, history: int, chunk_latents: int) -> LatentReading:
    """Compare the latents of the two latest chunks.

    Reads two numbers back from the device, at once.

    Args:
        latents: `[M, ...]` history, or None.
        history: M, as the cameras say.
        chunk_latents: latents of one chunk.

    Raises:
        ValueError: another number of latents than of cameras, or some that are not finite.
    """
    if latents is None:
        return LatentReading()
    if len(latents) != history:
        raise ValueError(
            f"latents must have one entry a pose, got {len(latents)} for {history} poses; "
            f"{_WANTED}"
        )
    if history == 0:
        return LatentReading()
    latest = latents[-chunk_latents:].detach().float()
    two = history >= 2 * chunk_latents
    before = latents[-2 * chunk_latents : -chunk_latents].detach().float() if two else latest
    change = (latest - before).square().mean()
    dynamics, power = torch.stack([change, latest.square().mean()]).tolist()
    if not math.isfinite(dynamics + power):
        raise ValueError(
            f"latents must be finite, got a mean square of {power:g} in the latest chunk and a "
            f"change of {dynamics:g}; look for NaN in the output of the chunk before and in the "
            "weights of the model"
        )
    return LatentReading(dynamics if two else None, power)
