"""Say of what kind a call is, for providers to tell whether they take it before it is planned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lipass.kernels.plan import BlockGrid, KvLayout


class Kind(NamedTuple):
    """What a provider takes or refuses a call by; a key of caches."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    """Head dim."""
    q_volume: int
    """Slots of a query tile."""
    k_volume: int
    """Slots of a key tile."""
    records: bool
    """Whether a gradient of the queries is recorded."""


def kind_of(q: Tensor, q_grid: BlockGrid, kv: KvLayout) -> Kind:
    """Say of what kind a call is.

    Args:
        q: queries `[B, H, Lq, D]`.
        q_grid: grid of the queries.
        kv: the key segments.
    """
    records = q.requires_grad and torch.is_grad_enabled()
    volumes = q_grid.block_tokens, kv.block_tokens
    return Kind(q.device, q.dtype, q.shape[3], *volumes, records)
