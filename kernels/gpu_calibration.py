"""Measure what this GPU does with each form of attention, when a model is compiled for it.

Never in a frame: until a device has been measured, the gate reads what is assumed in `cost.py`,
and providers are asked in the order of the registry. Each form is timed in bursts at six sizes, as
models pass their keys, the sparse one by every provider that takes such calls; a contender is
tried in a process of its own first. A line through the times gives the fixed cost of a form, its
rate over slots and its bandwidth. Kept for GPU, dtype, head dim, volume of a tile, whether blocks
are runs, versions and source of the kernels. Has not run on a GPU.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lipass.kernels import chip, dense, fastest, probe, registry
from lipass.kernels.block_sparse.kind import Asking, Kind
from lipass.kernels.calibration import Form, Rates, fit
from lipass.kernels.fastest import GpuKind
from lipass.kernels.formulas import work_of
from lipass.kernels.plan import BlockGrid, KvLayout
from lipass.kernels.planning import plan_attention
from lipass.kernels.select.api import selected_blocks

log = logging.getLogger(__name__)

_HEADS, _TEXT_TOKENS, _SIZE = 8, 512, (16, 32)
# Latents of the history and the chunk, budget: few and many of queries, keys and visits.
_CASES = ((8, 4, 0.5), (32, 4, 0.2), (32, 4, 0.8), (16, 8, 0.3), (8, 16, 0.2), (48, 8, 0.1))
# A burst is long enough for clocks to be those under load.
_BURST_MS, _ROUNDS = 12.0, 3
_TILES = {64: (4, 4, 4), 128: (4, 8, 4)}
_KEPT = "gpu_rates"

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
    names = _that_take(kind)
    if not names:
        return None  # such calls are dense whatever they cost
    try:
        with torch.inference_mode(False), torch.no_grad():
            rates, times = measure(kind, names, _burst_ms)
    except Exception as error:  # such as too little memory beside a model; it compiles without
        log.warning("how fast attention is on %s was not measured: %s", kind.device, error)
        return None
    _known[kind] = rates
    order = fastest.keep_times(kind, times)
    log.info("block-sparse attention on %s, fastest first: %s", kind.device, ", ".join(order))
    fastest.keep(kind, _KEPT, rates)
    return rates


def _that_take(kind: GpuKind) -> list[str]:
    """Name the providers that take such calls, after trying those that nobody has seen run."""
    asked = Kind(kind.device, kind.dtype, kind.dim, kind.volume, kind.volume, records=False)
    untried = registry.contenders("block_sparse", kind.device)
    names = []
    for name in (*registry.providers("block_sparse", kind.device), *untried):
        module = registry.module_of("block_sparse", name)
        if isinstance(module, str):
            continue
        if name in untried and module.unfit(asked) is None and (why := probe.try_out(name, asked)):
            log.warning("provider %s is not used on %s: %s", name, kind.device, why)
        if module.why_not(asked) is None:
            names.append(name)
    return names


def measure(
    kind: GpuKind, names: list[str], ms_of: Callable[[Callable[[], object]], float]
) -> tuple[Rates, dict[str, list[float]]]:
    """Time both forms at every size, the sparse one by each provider.

    Returns:
        Constants of the dense form and of the fastest provider, and the times of all providers
        that take the calls.

    Raises:
        ValueError: if no kernel takes such calls.
    """
    joined_ms: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in names}
    work: dict[str, list[tuple[float, float]]] = {"joined": [], "sparse": []}
    refused: dict[str, str] = {}
    for history, current, budget in _CASES:
        case = _Case(kind, history, current, budget)
        for form in work:
            work[form].append(case.work(form))
        joined_ms.append(ms_of(case.joined))
        for name in names:
            if name in refused:
                continue
            try:
                times[name].append(ms_of(case.sparse(name)))
            except Exception as error:  # errors of Triton's compiler are of no common class
                refused[name] = str(error).strip().partition("\n")[0]
                log.info("provider %s was not measured: %s", name, refused[name])
    whole = {name: taken for name, taken in times.items() if name not in refused}
    if not whole:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in refused.items()))
    best = fastest.order(whole)[0]
    rates = Rates(fit(work["joined"], joined_ms), None, fit(work["sparse"], whole[best]))
    return rates, whole


class _Case:
    """One call of decode."""

    def __init__(self, kind: GpuKind, history: int, current: int, budget: float) -> None:
        tile = _TILES[kind.volume]
        grids = [(1, 1, _TEXT_TOKENS), (history, *_SIZE), (current, *_SIZE)]
        if kind.in_runs:
            grids, tile = [(1, 1, t * y * x) for t, y, x in grids], (1, 1, kind.volume)
        self.layout = KvLayout.build(("text", "history", "current"), tuple(grids), tile)
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

    def joined(self) -> Tensor:
        """Attend densely."""
        return dense.attend_joined(self.q, self.k, self.v, self.scale)

    def sparse(self, provider: str) -> Callable[[], object]:
        """Return one call of a provider, planning included.

        Raises:
            ValueError: if it refuses the call.
        """
        asking = Asking(self.q, self.k, self.v, self.q_grid, self.layout, False)
        chosen = registry.choose("block_sparse", self.q.device, provider, asking)

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
    with contextlib.suppress(ValueError, TypeError):
        joined, _, sparse = fastest.read(kind, _KEPT)
        return Rates(Form(*joined), None, Form(*sparse))
    return None
