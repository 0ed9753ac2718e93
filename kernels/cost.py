"""Predict whether sparse attention pays on this device: the gate in front of each call.

```text
dense  = flops(all keys) / rate
sparse = fixed + flops(visited keys) / (rate * efficiency) + (copied + pooled bytes) / bandwidth
```

On the CPU rate and bandwidth are measured once per process and dtype (some 20 ms, at the first
call that asks). What depends on the implementation only, `fixed` and `efficiency`, is a constant.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels.plan import BlockGrid, KvLayout


class Rates(NamedTuple):
    """What one device does with one dtype."""

    flops_per_ms: float
    bytes_per_ms: float
    """Copying rows that are gathered; infinite where tiles are read in place."""
    fixed_ms: float
    """Planning and launching, whatever the size."""


# 25 tensor operations and the operator itself, 2 Zen 3 cores, 256 queries, 800 keys.
_CPU_FIXED_MS = 0.55
# Share of the rate of dense attention that gathered blocks reach. The CPU kernel cuts fewer than
# 192 queries into slices of 32. Zen 3, one and two cores, 36 shapes of 256 to 1,280 queries.
_CPU_FEW_QUERIES, _CPU_FEW_EFFICIENCY, _CPU_EFFICIENCY = 192, 0.78, 0.9
# Assumed, not measured: about 25 launches, half of the dense bf16 peak of an H200 for dense calls
# and 0.7 of that for the block-sparse kernel.
_CUDA_RATES = Rates(flops_per_ms=400e9, bytes_per_ms=float("inf"), fixed_ms=0.15)
_CUDA_EFFICIENCY = 0.7


def why_dense(q: Tensor, layout: KvLayout, q_grid: BlockGrid, visited_blocks: int) -> str:
    """Return why a call should stay dense, or nothing; some microseconds after the first call.

    Args:
        q: queries `[B, H, Lq, D]`.
        layout: the key segments.
        q_grid: grid of the queries.
        visited_blocks: blocks that each query block would visit, `S`.
    """
    sparse_ms, dense_ms = predict(q, layout, q_grid, visited_blocks)
    if sparse_ms < dense_ms:
        return ""
    return f"predicted {sparse_ms:.2f} ms sparse vs {dense_ms:.2f} ms dense"


def predict(
    q: Tensor, layout: KvLayout, q_grid: BlockGrid, visited_blocks: int
) -> tuple[float, float]:
    """Predict the time of a call in ms, sparse and dense."""
    heads, dim = q.shape[0] * q.shape[1], q.shape[3]
    rates, efficiency = _CUDA_RATES, _CUDA_EFFICIENCY
    if q.device.type == "cpu":
        rates = cpu_rates(q.dtype, torch.get_num_threads())
        few = q_grid.block_tokens < _CPU_FEW_QUERIES
        efficiency = _CPU_FEW_EFFICIENCY if few else _CPU_EFFICIENCY
    # Every slot is computed, also those of tails without a token.
    keys = min(visited_blocks * layout.block_tokens, layout.tokens)
    slots = heads * q_grid.blocks * q_grid.block_tokens
    copied = 2 * heads * q_grid.blocks * keys * dim * q.element_size()
    pooled = heads * (q_grid.tokens + layout.tokens) * dim * q.element_size()
    sparse = rates.fixed_ms + (copied + pooled) / rates.bytes_per_ms
    sparse += 4.0 * slots * keys * dim / (rates.flops_per_ms * efficiency)
    return sparse, 4.0 * heads * q_grid.tokens * layout.tokens * dim / rates.flops_per_ms


@functools.lru_cache(maxsize=16)
def cpu_rates(dtype: torch.dtype, threads: int) -> Rates:
    """Measure this CPU with the current number of threads; the best of a few runs."""
    q, k = torch.zeros(1, 2, 256, 64, dtype=dtype), torch.zeros(1, 2, 1024, 64, dtype=dtype)
    # Out of the cores' own caches, as the keys of a real call are.
    rows, picked = torch.zeros(8192, 256, dtype=dtype), torch.arange(8192)
    out = torch.empty_like(rows)
    attend_ms = _best_ms(lambda: F.scaled_dot_product_attention(q, k, k))
    copy_ms = _best_ms(lambda: torch.index_select(rows, 0, picked, out=out))
    return Rates(
        flops_per_ms=4.0 * 2 * 256 * 1024 * 64 / attend_ms,
        bytes_per_ms=rows.numel() * rows.element_size() / copy_ms,
        fixed_ms=_CPU_FIXED_MS,
    )


def _best_ms(call: Callable[[], object], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9) * 1e3
