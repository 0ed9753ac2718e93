"""Predict whether sparse attention pays on this device: the gate in front of each call.

```text
dense  = bytes of keys joined / bandwidth + flops(all keys) / dense rate
sparse = fixed + flops(visited keys) / sparse rate + (copied + pooled bytes) / bandwidth
```

On the CPU all four constants are measured once per process, dtype, number of threads and form of
the sparse kernel (some 30 ms, at the first call that asks), so that they hold for whatever machine
and build this is.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.kernels.block_sparse import gather, native
from lipass.kernels.plan import BlockGrid, KvLayout
from lipass.kernels.planning import plan_attention


class Rates(NamedTuple):
    """What one device does with one dtype and one form of the kernel."""

    dense_flops_per_ms: float
    sparse_flops_per_ms: float
    bytes_per_ms: float
    """Copying rows; infinite where nothing is ever copied."""
    fixed_ms: float
    """Planning and launching, whatever the size."""


# Around the two compiled calls: checks, the gate itself, counting; 2 cores, one query block.
_OPERATOR_MS = 0.05
# Assumed, not measured: about 25 launches, half of the dense bf16 peak of an H200 for dense calls
# and 0.7 of that for the block-sparse kernel.
_CUDA_RATES = Rates(400e9, 0.7 * 400e9, float("inf"), 0.15)
# The compiled kernel computes this many queries at a time, idle lanes included.
_LANES = 32


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
    rates, form = _CUDA_RATES, "triton"
    if q.device.type == "cpu":
        form = "native" if native.why_not_loaded() is None else "gather"
        rates = cpu_rates(q.dtype, torch.get_num_threads(), form)
    row = q.shape[0] * q.shape[1] * q.shape[3] * q.element_size()
    flops = 4.0 * q.shape[0] * q.shape[1] * q.shape[3]
    return _predict(rates, form, row, flops, layout, q_grid, visited_blocks)


def predict_pieces(
    rates: Rates,
    pairs: int,
    dim: int,
    dtype: torch.dtype,
    layout: KvLayout,
    q_grid: BlockGrid,
) -> tuple[float, float]:
    """Predict in ms the compiled kernel over all blocks, and SDPA over joined keys; CPU only.

    Args:
        rates: of the device, for the compiled kernel.
        pairs: batch times heads.
        dim: head dim.
        dtype: of the call.
        layout: the pieces.
        q_grid: grid of the queries.
    """
    row, flops = pairs * dim * dtype.itemsize, 4.0 * pairs * dim
    return _predict(rates, "native", row, flops, layout, q_grid, layout.blocks)


@functools.lru_cache(maxsize=512)
def _predict(
    rates: Rates,
    form: str,
    row: int,
    flops: float,
    layout: KvLayout,
    q_grid: BlockGrid,
    visited_blocks: int,
) -> tuple[float, float]:
    """Predict from the bytes of one token over all heads and the FLOPs of one pair of tokens."""
    keys = min(visited_blocks * layout.block_tokens, layout.tokens)
    copied, slots = 0, q_grid.block_tokens
    if form == "gather":
        copied = 2 * q_grid.blocks * keys * row
    elif form == "native":
        slots = -(-slots // _LANES) * _LANES
        if not _lies_in_runs(layout):
            copied = 2 * min(q_grid.blocks * keys, layout.tokens) * row
    # A plan over all blocks is known without a look at queries and keys.
    pooled, fixed_ms = 0, _OPERATOR_MS
    if keys < layout.tokens:
        pooled, fixed_ms = (q_grid.tokens + layout.tokens) * row, rates.fixed_ms
    sparse = fixed_ms + (copied + pooled) / rates.bytes_per_ms
    sparse += flops * q_grid.blocks * slots * keys / rates.sparse_flops_per_ms
    joined = 2 * layout.tokens * row if len(layout.segments) > 1 else 0
    dense = joined / rates.bytes_per_ms
    dense += flops * q_grid.tokens * layout.tokens / rates.dense_flops_per_ms
    return sparse, dense


@functools.lru_cache(maxsize=512)
def _lies_in_runs(layout: KvLayout) -> bool:
    """Whether each block is one run of rows, which the compiled kernel reads where it lies."""
    for segment in layout.segments:
        (_, size_y, size_x), (tile_t, tile_y, tile_x) = segment.grid.grid, segment.grid.tile
        rows_whole = tile_x >= size_x or (tile_t == 1 and tile_y == 1)
        if not rows_whole or not (tile_y >= size_y or tile_t == 1):
            return False
    return True


@functools.lru_cache(maxsize=16)
def cpu_rates(dtype: torch.dtype, threads: int, form: str) -> Rates:
    """Measure this CPU with the current number of threads; the best of a few runs."""
    module = native if form == "native" else gather
    layout = KvLayout.build(("current",), ((16, 8, 8),), (1, 8, 8))
    q_grid = BlockGrid((4, 8, 8), (1, 8, 8))
    q, k = torch.zeros(1, 4, 256, 64, dtype=dtype), torch.zeros(1, 4, 1024, 64, dtype=dtype)
    one = KvLayout.build(("history",), ((2, 8, 8),), (1, 8, 8))

    def plan(layout: KvLayout, q: Tensor, k: Tensor, q_grid: BlockGrid, role: str, budget: float):
        return plan_attention(
            q, [k], layout, q_grid, budget=budget, scale=1.0, role=role, sink_latents=0
        )

    def smallest() -> None:
        q_one, k_one = q[:, :1, :64], k[:, :1, :128]
        made = plan(one, q_one, k_one, BlockGrid((1, 8, 8), (1, 8, 8)), "decode", 0.5)
        module.block_sparse_attention(q_one, [k_one], [k_one], made, scale=1.0, key_bias=None)

    with torch.inference_mode(False), torch.no_grad():
        # The rest of the calls visits every block: no candidate, so that all of them are kept.
        whole = plan(layout, q, k, q_grid, "decode", 1.0)
        # Out of the cores' own caches, as the keys of a real call are.
        rows, picked = torch.zeros(8192, 256, dtype=dtype), torch.arange(8192)
        out = torch.empty_like(rows)
        dense_ms, sparse_ms, copy_ms, fixed_ms = _best_ms(
            [
                lambda: F.scaled_dot_product_attention(q, k, k),
                lambda: module.block_sparse_attention(
                    q, [k], [k], whole, scale=1.0, key_bias=None
                ),
                lambda: torch.index_select(rows, 0, picked, out=out),
                smallest,
            ]
        )
    flops, bytes_per_ms = 4.0 * q.numel() * 1024, rows.nbytes / copy_ms
    if form == "gather":
        # What it copies is counted apart, as it depends on the size of the query blocks.
        copied = 2 * q_grid.blocks * k.nbytes
        sparse_ms = max(sparse_ms - copied / bytes_per_ms, sparse_ms / 2)
    return Rates(
        dense_flops_per_ms=flops / dense_ms,
        sparse_flops_per_ms=flops / sparse_ms,
        bytes_per_ms=bytes_per_ms,
        fixed_ms=fixed_ms + _OPERATOR_MS,
    )


def _best_ms(calls: list[Callable[[], object]], repeats: int = 15) -> list[float]:
    """Time calls in turns, so that all see the same machine; the best of each."""
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for n, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[n] = min(best[n], time.perf_counter() - start)
    return [max(seconds, 1e-9) * 1e3 for seconds in best]
