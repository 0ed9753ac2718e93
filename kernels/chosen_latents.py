"""Ask, where keys of a history are about to be read, which of its latents a session has chosen.

For graphs that show no cameras: nothing in them says which latents a view needs, and a cache that
is written in place cannot be made shorter from outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels import registry


@torch.library.custom_op("lipass::chosen_latents", mutates_args=())
def chosen_latents(keys: Tensor, per_latent: int) -> Tensor:
    """Say which latents of a history are read, `[1, T]` bool on the host; all where nobody chose.

    `registry.answer("chosen_latents", ..)` may choose, from the same arguments.

    Args:
        keys: of the history, `[B, H, T * per_latent, D]`; only their number is read.
        per_latent: tokens of one latent.
    """
    if (known := registry.answer_of("chosen_latents")) is not None:
        return known(keys, per_latent)
    return torch.ones(1, keys.shape[2] // per_latent, dtype=torch.bool)


@chosen_latents.register_fake
def _chosen_latents_fake(keys: Tensor, per_latent: int) -> Tensor:
    return keys.new_empty(1, keys.shape[2] // per_latent, dtype=torch.bool, device="cpu")
