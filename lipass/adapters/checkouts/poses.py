"""Make a walk whose views are left and come back to, so that each approximation has its chance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_AWAY_DEG, _TURN_DEG = 80.0, 1.0


def there_and_back(chunks: int, chunk_latents: int) -> Tensor:
    """Return world-to-camera matrices `[chunks * chunk_latents, 4, 4]`, one a latent.

    Each second chunk looks the other way, turning slowly; so from the third on a chunk comes back
    to what was left.
    """
    cameras = torch.eye(4).repeat(chunks * chunk_latents, 1, 1)
    for index in range(len(cameras)):
        chunk, latent = divmod(index, chunk_latents)
        yaw = math.radians(_AWAY_DEG * (chunk % 2) + _TURN_DEG * latent)
        cosine, sine = math.cos(yaw), math.sin(yaw)
        cameras[index, :3, :3] = torch.tensor(
            [[cosine, 0.0, -sine], [0.0, 1.0, 0.0], [sine, 0.0, cosine]]
        )
    return cameras
