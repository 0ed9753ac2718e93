"""Measure what this GPU does with each form of attention, when a model is compiled for it.

Never in a frame: until a device has been measured, the gate reads what is assumed in `cost.py`.
Each form is timed in bursts at six sizes, as models pass their keys; a line through the times
gives its fixed cost, its rate over slots and its bandwidth. Kept for GPU, dtype, head dim, volume
of a tile, versions and source of the kernels. Has not run on a GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lipass.kernels import chip, dense, registry
from lipass.kernels.block_sparse import native
from lipass.kernels.block_sparse.kind import Asking, Kind
from lipass.kernels.calibration import Form, Rates, fit
from lipass.kernels.formulas import work_of
from lipass.kernels.plan import BlockGrid, KvLayout
from lipass.kernels.planning import plan_attention
from lipass.kernels.select.api import selected_blocks
from lipass.kernels.source import kernels_hash

log = logging.getLogger(__name__)

_HEADS, _TEXT_TOKENS, _SIZE = 8, 512, (16, 32)
# Latents of the history and the chunk, budget: few and many of queries, keys and visits.
_CASES = ((8, 4, 0.5), (32, 4, 0.2), (32, 4, 0.8), (16, 8, 0.3), (8, 16, 0.2), (48, 8, 0.1))
# A burst is long enough for clocks to be those under load.
_BURST_MS, _ROUNDS = 12.0, 3
_TILES = {64: (4, 4, 4), 128: (4, 8, 4)}


class GpuKind(NamedTuple):
    """What a GPU's constants hold for."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    """Head dim."""
    volume: int
    """Slots of a tile."""


_known: dict[GpuKind, Rates | None] = {}


def rates_of(kind: GpuKind) -> Rates | None:
    """Return what was measured, by this process or one before; None where nobody has."""
    if kind not in _known:
        _known[kind] = _read(kind)
    return _known[kind]


def calibrate(kind: GpuKind) -> Rates | None:
    """Measure unless it is known; None, with the reason in the log, where that fails."""
    if (found := rates_of(kind)) is not None or kind.volume not in _TILES:
        return found
    asked = Kind(*kind[:3], kind.volume, kind.volume, records=False)
    chosen = registry.find("block_sparse", kind.device, lambda module: module.why_not(asked))
    if isinstance(chosen, registry.Refused):
        return None  # such calls are dense whatever they cost
    try:
        with torch.inference_mode(False), torch.no_grad():
            rates = measure(kind, _burst_ms)
    except (RuntimeError, ValueError) as error:  # such as too little memory beside a model
        log.warning("how fast attention is on %s was not measured: %s", kind.device, error)
        return None
    _known[kind] = rates
    path = _path(kind)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{time.time_ns()}")
        part.write_text(json.dumps(rates))
        part.replace(path)
    return rates


def measure(kind: GpuKind, ms_of: Callable[[Callable[[], object]], float]) -> Rates:
    """Time both forms at every size.

    Raises:
        ValueError: if no kernel takes such calls.
    """
    work: dict[str, list[tuple[float, float]]] = {"joined": [], "sparse": []}
    times: dict[str, list[float]] = {"joined": [], "sparse": []}
    for history, current, budget in _CASES:
        case = _Case(kind, history, current, budget)
        for form in work:
            work[form].append(case.work(form))
            times[form].append(ms_of(case.call(form)))
    joined, sparse = (fit(work[form], times[form]) for form in ("joined", "sparse"))
    return Rates(joined, None, sparse)


class _Case:
    """One call of decode."""

    def __init__(self, kind: GpuKind, history: int, current: int, budget: float) -> None:
        tile = _TILES[kind.volume]
        grids = ((1, 1, _TEXT_TOKENS), (history, *_SIZE), (current, *_SIZE))
        self.layout = KvLayout.build(("text", "history", "current"), grids, tile)
        self.q_grid = BlockGrid(grids[-1], tile)
        self.budget, self.scale, self.kind = budget, kind.dim**-0.5, kind

        def draw(tokens: int) -> Tensor:
            # Of a generator of its own: random numbers of the user stay theirs.
            made = torch.Generator(device=kind.device).manual_seed(tokens)
            shape = (1, tokens, _HEADS, kind.dim)
            drawn = torch.randn(shape, generator=made, device=kind.device, dtype=torch.float32)
            return drawn.to(kind.dtype).transpose(1, 2)

        tokens = self.layout.segment_tokens
        self.q, self.k, self.v = draw(tokens[-1]), [*map(draw, tokens)], [*map(draw, tokens)]

    def work(self, form: str) -> tuple[float, float]:
        """Count its FLOPs and bytes."""
        visited = selected_blocks(self.layout, self.q_grid, self.budget, "decode", 0)
        programs = self.q_grid.blocks * _HEADS
        return work_of(
            _HEADS * self.kind.dim, self.kind.dtype.itemsize, self.layout, self.q_grid, form,
            visited, True, (programs, chip.processors(self.kind.device)),
        )  # fmt: skip

    def call(self, form: str) -> Callable[[], object]:
        """Return one call, planning included."""
        if form == "joined":
            return lambda: dense.attend_joined(self.q, self.k, self.v, self.scale)
        asking = Asking(self.q, self.k, self.v, self.q_grid, self.layout, False)
        chosen = registry.choose("block_sparse", self.q.device, None, asking)

        def attend() -> object:
            plan = plan_attention(
                self.q, self.k, self.layout, self.q_grid, budget=self.budget, scale=self.scale,
                role="decode", sink_latents=0,
            )  # fmt: skip
            return chosen.module.block_sparse_attention(
                self.q, self.k, self.v, plan, scale=self.scale, key_bias=None
            )

        return attend


def _burst_ms(call: Callable[[], object]) -> float:
    """Time bursts of a call on the GPU; the best of some, after one that compiles."""
    for _ in range(3):
        call()
    best, count = float("inf"), 1
    for turn in range(_ROUNDS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        ms = begin.elapsed_time(end) / count
        if turn == 0:
            count = max(1, min(100, int(_BURST_MS / max(ms, 1e-3))))
        else:
            best = min(best, ms)
    return best


def _read(kind: GpuKind) -> Rates | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        joined, _, sparse = json.loads(_path(kind).read_text())
        return Rates(Form(*joined), None, Form(*sparse))
    return None


def _path(kind: GpuKind) -> Path:
    """Name the file by all that the constants depend on."""
    parts = [
        chip.name(kind.device), str(kind.dtype), str(kind.dim), str(kind.volume),
        torch.__version__, chip.triton_version(), kernels_hash(),
    ]  # fmt: skip
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return native.cache_folder() / f"gpu_rates_{key}.json"
