"""Tell graphs that a session has chosen what they may read, so that they do not choose again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lipass.kernels import registry


@contextmanager
def chosen_by_caller(kept: tuple[int, ...] | None = None, latents: int = 0) -> Iterator[None]:
    """Do not score views in graphs called inside: the session has, once for the chunk.

    Args:
        kept: the views of the memory that score 1, all others -1, which is below any threshold;
            None where the memory holds nothing else.
        latents: how many the memory holds.
    """

    def score(query_w2c: Tensor, memory_w2c: Tensor) -> Tensor:
        """Give scores `[B, M]` for memory cameras `[B, M, 4, 4]`."""
        shape = memory_w2c.shape[:-2]
        if kept is None:
            return query_w2c.new_ones(shape)
        scores = query_w2c.new_full(shape, -1.0)
        for view in kept:
            scores[..., view] = 1.0
        return scores

    def choose(keys: Tensor, per_latent: int) -> Tensor:
        """Give `[1, T]` bool, which latents of a history are read."""
        held = keys.shape[2] // per_latent
        if kept is None or held != latents:
            return torch.ones(1, held, dtype=torch.bool)
        keep = torch.zeros(1, held, dtype=torch.bool)
        keep[:, list(kept)] = True
        return keep

    with registry.answer("view_overlap", score), registry.answer("chosen_latents", choose):
        yield
