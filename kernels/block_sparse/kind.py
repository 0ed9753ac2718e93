"""Say of what kind a call is, for providers to tell whether they take it before it is planned."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
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


def asking(
    q: Tensor, keys: list[Tensor], values: list[Tensor], q_grid: BlockGrid, kv: KvLayout,
    biased: bool,
) -> Callable[[ModuleType], str | None]:  # fmt: skip
    """Return what asks a provider why it cannot take a call.

    Args:
        q: queries `[B, H, Lq, D]`.
        keys: one tensor `[B, H, L, D]` per segment, or one of all.
        values: like `keys`.
        q_grid: grid of the queries.
        kv: the key segments.
        biased: whether scores get a bias, or keys inside a visited block are masked.
    """
    kind = kind_of(q, q_grid, kv)

    def why_not(module: ModuleType) -> str | None:
        why: str | None = module.why_not(kind)
        if why is None and (laid := getattr(module, "why_not_laid", None)):
            why = laid(q, keys, values, q_grid, kv, biased)
        return why

    return why_not
