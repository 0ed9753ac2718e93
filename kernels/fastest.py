"""Remember which providers were measured fastest on a GPU: those are asked first.

Nothing is assumed of a provider that nobody has measured; the order is then that of the registry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lipass.kernels import chip
from lipass.kernels.source import kernels_hash


class GpuKind(NamedTuple):
    """What measurements of a GPU hold for."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    """Head dim."""
    volume: int
    """Slots of a tile."""
    in_runs: bool = False
    """Whether every block is a run of tokens, as tile order makes them."""


_orders: dict[GpuKind, tuple[str, ...]] = {}


def order_of(kind: GpuKind) -> tuple[str, ...]:
    """Name the providers that were measured, by this process or one before, fastest first."""
    if kind not in _orders:
        found = read(kind, "gpu_providers")
        _orders[kind] = order(found) if isinstance(found, dict) else ()
    return _orders[kind]


def keep_times(kind: GpuKind, ms: Mapping[str, list[float]]) -> tuple[str, ...]:
    """Remember the times of each provider in the same calls; name them, fastest first."""
    _orders[kind] = order(ms)
    keep(kind, "gpu_providers", ms)
    return _orders[kind]


def order(ms: Mapping[str, list[float]]) -> tuple[str, ...]:
    """Sort by the mean of logarithms, so that short calls count as much as long ones."""
    mean = {name: sum(map(math.log, times)) / len(times) for name, times in ms.items()}
    return tuple(sorted(mean, key=mean.__getitem__))


def read(kind: GpuKind, what: str) -> Any:
    """Return what an earlier process has kept under a name, or None."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(_path(kind, what).read_text())
    return None


def keep(kind: GpuKind, what: str, found: object) -> None:
    """Write it into the user's cache, where that can be written."""
    path = _path(kind, what)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{time.time_ns()}")
        part.write_text(json.dumps(found))
        part.replace(path)


def _path(kind: GpuKind, what: str) -> Path:
    """Name the file by all that measurements depend on."""
    from lipass.kernels.block_sparse.native import cache_folder  # it asks what asks for orders

    given = map(str, (*kind[1:], torch.__version__, chip.triton_version()))
    parts = [chip.name(kind.device), *given, kernels_hash()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / f"{what}_{key}.json"
