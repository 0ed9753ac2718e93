"""Say of what kind a call is, for providers to tell whether they take it before it is planned."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipass.kernels.fastest import GpuKind, order_of
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
    """Whether a gradient of queries, keys, values or a bias is recorded."""


def kind_of(
    q: Tensor, q_grid: BlockGrid, kv: KvLayout, others: Sequence[Tensor | None] = ()
) -> Kind:
    """Say of what kind a call is.

    Args:
        q: queries `[B, H, Lq, D]`.
        q_grid: grid of the queries.
        kv: the key segments.
        others: keys, values and a bias, whose gradients may be recorded as well.
    """
    volumes = q_grid.block_tokens, kv.block_tokens
    return Kind(q.device, q.dtype, q.shape[3], *volumes, records(q, *others))


def records(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of these is recorded."""
    if not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in tensors)


def measured(kind: Kind, kv: KvLayout) -> tuple[str, ...]:
    """Name the providers that were measured on calls of a kind, fastest first."""
    if kind.device.type != "cuda":
        return ()
    return order_of(GpuKind(kind.device, kind.dtype, kind.dim, kind.k_volume, kv.in_runs))


class Asking:
    """Ask providers why they cannot take a call.

    Attributes:
        laid: how the provider that was asked last found the tensors to lie, for its call; None
            where it does not look.

    Args:
        q: queries `[B, H, Lq, D]`.
        keys: one tensor `[B, H, L, D]` per segment, or one of all.
        values: like `keys`.
        q_grid: grid of the queries.
        kv: the key segments.
        biased: whether scores get a bias, or keys inside a visited block are masked.
        bias: the bias, if one is given.
    """

    def __init__(
        self, q: Tensor, keys: list[Tensor], values: list[Tensor], q_grid: BlockGrid,
        kv: KvLayout, biased: bool, bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.laid: Any = None
        self._call = (q, keys, values, q_grid, kv, biased)
        self._kind = kind_of(q, q_grid, kv, (*keys, *values, bias))

    @property
    def measured(self) -> tuple[str, ...]:
        """Providers that were measured on such calls, fastest first."""
        return measured(self._kind, self._call[4])

    def __call__(self, module: ModuleType) -> str | None:
        """Give the reason why a provider cannot take the call, or None."""
        self.laid = None
        why: str | None = module.why_not(self._kind)
        if why is None and (lay := getattr(module, "lay", None)):
            found = lay(*self._call)
            if isinstance(found, str):
                return found
            self.laid = found
        return why
