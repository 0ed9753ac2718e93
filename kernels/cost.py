"""Predict which form of attention is fastest on this device: the gate in front of each call.

```text
ms = fixed + flops / rate + bytes / bandwidth        for each form
```

FLOPs and bytes are counted (`formulas.py`); the constants are measured (`calibration.py`,
`gpu_calibration.py`), so that they hold for whatever machine and build this is.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from lipass.kernels import calibration, chip, gpu_calibration
from lipass.kernels.calibration import Form, Rates
from lipass.kernels.fastest import GpuKind
from lipass.kernels.formulas import work_of
from lipass.kernels.plan import BlockGrid, KvLayout

# Of a GPU that nobody has measured, assumed from published figures of an H100: dense attention by
# cuDNN, two thirds of its rate for the block-sparse kernel, copies at half the memory's bandwidth.
ASSUMED = Rates(
    joined=Form(0.02, 600e9, 1.3e9),
    apart=None,
    sparse=Form(0.12, 400e9, 2.6e9),
)


class Prediction(NamedTuple):
    """Predicted time of a call in each form, in ms; infinite where a form cannot run."""

    sparse_ms: float
    joined_ms: float
    apart_ms: float

    @property
    def dense_ms(self) -> float:
        """Of the faster dense form."""
        return min(self.joined_ms, self.apart_ms)

    @property
    def why_dense(self) -> str:
        """Why the call should stay dense, or nothing."""
        if self.sparse_ms < self.dense_ms:
            return ""
        return f"predicted {self.sparse_ms:.2f} ms sparse vs {self.dense_ms:.2f} ms dense"


def predict(
    q_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    layout: KvLayout,
    q_grid: BlockGrid,
    visited_blocks: int,
    *,
    sorts: bool = False,
) -> Prediction:
    """Predict the time of a call in every form; some microseconds after the first call.

    Args:
        q_shape: `(B, H, Lq, D)` of the queries.
        dtype: of the call.
        device: of the call.
        layout: the key segments.
        q_grid: grid of the queries.
        visited_blocks: blocks that each query block would visit, `S`.
        sorts: whether keys and queries are sorted first; counted in full, though a session sorts
            keys once a chunk.
    """
    batch, heads, _, dim = q_shape
    layout, q_grid = layout.laid, q_grid.laid
    compiled, gpu = True, None
    if device.type == "cpu":
        rates_of = calibration.sorted_rates if sorts else calibration.cpu_rates
        rates = rates_of(dtype, dim, torch.get_num_threads())
        compiled = rates.apart is not None
    else:
        kind = GpuKind(device, dtype, dim, layout.block_tokens, layout.in_runs)
        rates = gpu_calibration.rates_of(kind) or ASSUMED
        gpu = batch * heads * q_grid.blocks, chip.processors(device)
    rows = batch * heads * dim
    return _predict(rates, compiled, rows, dtype.itemsize, layout, q_grid, visited_blocks, gpu)


@functools.lru_cache(maxsize=2048)
def _predict(
    rates: Rates,
    compiled: bool,
    rows: int,
    number_bytes: int,
    layout: KvLayout,
    q_grid: BlockGrid,
    visited_blocks: int,
    gpu: tuple[int, int] | None,
) -> Prediction:
    def ms(name: str, form: Form | None) -> float:
        if form is None:
            return float("inf")
        flops, moved = work_of(
            rows, number_bytes, layout, q_grid, name, visited_blocks, compiled, gpu
        )
        return form.fixed_ms + flops / form.flops_per_ms + moved / form.bytes_per_ms

    return Prediction(
        ms("sparse", rates.sparse), ms("joined", rates.joined), ms("apart", rates.apart)
    )
