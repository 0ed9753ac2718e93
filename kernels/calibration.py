"""Measure what this CPU does with each form of attention: the constants of the cost gate.

Every form is timed at six sizes, on keys laid out as models pass them; a line through the times
gives its fixed cost, its rate and its bandwidth. About a second, once per machine,
dtype, head dim and number of threads: later processes read the result from the cache, and measure
again if they find the machine clearly faster, as it was busy then. What a machine does that is
plainly busy is not kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lipass.kernels import dense
from lipass.kernels.block_sparse import gather, in_order, native
from lipass.kernels.formulas import work_of
from lipass.kernels.nearest.basis import basis_of
from lipass.kernels.nearest.order import sort_keys
from lipass.kernels.nearest.plan import Buckets, in_rows, plan_in_order, rows_of
from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout
from lipass.kernels.planning import plan_attention
from lipass.kernels.select.api import selected_blocks
from lipass.kernels.source import kernels_hash

log = logging.getLogger(__name__)

_HEADS = 3
_TEXT_TOKENS = 32
_ROUNDS = 12
# Directions of sorted keys, as many as `nearest-blocks` asks for.
_AXES = 8
# History and current latents of 8 x 8 tokens, budget: many and few of queries, keys and visits.
_CASES = ((2, 1, 0.5), (40, 1, 0.1), (8, 4, 0.9), (28, 4, 0.3), (12, 12, 0.6), (128, 8, 0.2))
# A call that is longer is timed a few times only.
_LONG_MS = 5.0
# No call costs as much by itself: threads wait for others that have lost their core.
_BUSY_MS = 0.5
# The case that tells whether kept constants still hold, and how much faster it has to be.
_CHECKED, _CLEARLY = 2, 0.75


class Form(NamedTuple):
    """What one form of attention costs: `fixed + flops / rate + bytes / bandwidth`."""

    fixed_ms: float
    flops_per_ms: float
    bytes_per_ms: float


class Rates(NamedTuple):
    """What one device does with one dtype."""

    joined: Form
    """SDPA over joined keys."""
    apart: Form | None
    """The compiled kernel over all blocks where they lie; None where it is not built."""
    sparse: Form
    """The block-sparse kernel, planning included."""


def cpu_rates(dtype: torch.dtype, dim: int, threads: int) -> Rates:
    """Return the constants of this CPU, from the cache or measured now.

    Args:
        dtype: of queries, keys and values.
        dim: head dim.
        threads: as many as torch uses.
    """
    return _rates(dtype, dim, threads, _compiles(dtype), False)


def sorted_rates(dtype: torch.dtype, dim: int, threads: int) -> Rates:
    """Return the same where the sparse form sorts keys and queries first; sorting is counted."""
    return _rates(dtype, dim, threads, _compiles(dtype), True)


def _compiles(dtype: torch.dtype) -> bool:
    return dtype in native.DTYPES and native.why_not_loaded() is None


@functools.lru_cache(maxsize=64)
def _rates(dtype: torch.dtype, dim: int, threads: int, compiled: bool, sorts: bool) -> Rates:
    path = _cache_path(dtype, dim, threads, compiled, sorts)
    with contextlib.suppress(OSError, ValueError, TypeError):
        joined, apart, sparse = json.loads(path.read_text())
        rates = Rates(Form(*joined), None if apart is None else Form(*apart), Form(*sparse))
        if not _beaten(rates, dtype, dim, compiled, sorts):
            return rates
    rates = measure(dtype, dim, compiled, sorts)
    if max(form.fixed_ms for form in rates if form is not None) > _BUSY_MS:
        log.warning(
            "other programs use the cores while lipass measures how fast dense and sparse "
            "attention are here; what it measured decides between the two in this process only, "
            "and a later process measures again"
        )
        return rates
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{time.time_ns()}")
        part.write_text(json.dumps(rates))
        part.replace(path)
    except OSError as error:
        log.warning(
            "how fast dense and sparse attention are here could not be kept in %s (%s); each "
            "process measures it anew, for about a second",
            path.parent,
            error,
        )
    return rates


def measure(dtype: torch.dtype, dim: int, compiled: bool, sorts: bool = False) -> Rates:
    """Time every form on this CPU with the current number of threads."""
    names = ("joined", "apart", "sparse") if compiled else ("joined", "sparse")
    work: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    times_ms: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for history, current, budget in _CASES:
            case = _Case(history, current, budget, dtype, dim, sorts)
            best = _best_ms([functools.partial(case.run, name, compiled) for name in names])
            for name, ms in zip(names, best, strict=True):
                work[name].append(case.work(name, compiled))
                times_ms[name].append(ms)
    forms = {name: fit(work[name], times_ms[name]) for name in names}
    return Rates(forms["joined"], forms.get("apart"), forms["sparse"])


def _beaten(rates: Rates, dtype: torch.dtype, dim: int, compiled: bool, sorts: bool) -> bool:
    """Whether some form is clearly faster than its constants, which were measured under load."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        case = _Case(*_CASES[_CHECKED], dtype, dim, sorts)
        forms = {name: form for name, form in rates._asdict().items() if form is not None}
        found = _best_ms([functools.partial(case.run, name, compiled) for name in forms], 4)
    for (name, form), ms in zip(forms.items(), found, strict=True):
        flops, moved = case.work(name, compiled)
        if ms < _CLEARLY * (form.fixed_ms + flops / form.flops_per_ms + moved / form.bytes_per_ms):
            log.info("%s is faster than its constants; they are measured again", name)
            return True
    return False


class _Case:
    """One call of decode, in every form."""

    def __init__(
        self, history: int, current: int, budget: float, dtype: torch.dtype, dim: int, sorts: bool
    ) -> None:
        grids = ((1, 1, _TEXT_TOKENS), (history, 8, 8), (current, 8, 8))
        self.layout = KvLayout.build(("text", "history", "current"), grids, (1, 8, 8))
        self.q_grid = BlockGrid(grids[-1], (1, 8, 8))
        self.sorts = sorts
        if sorts:
            self.layout, _ = in_rows(self.layout, self.q_grid)
            self.q_grid = rows_of(BlockGrid(grids[-1], (1, 4, 8)))
        self.budget, self.scale = budget, dim**-0.5
        tokens = [segment.grid.tokens for segment in self.layout.segments]

        generator = torch.Generator().manual_seed(0)  # the user's random numbers stay theirs

        def draw(length: int) -> Tensor:
            shape = (1, length, _HEADS, dim)
            drawn = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
            return drawn.to(dtype).transpose(1, 2)

        self.q = draw(tokens[-1])
        self.k, self.v = [draw(n) for n in tokens], [draw(n) for n in tokens]

    def work(self, form: str, compiled: bool) -> tuple[float, float]:
        """Count its FLOPs and bytes."""
        visited = selected_blocks(self.layout, self.q_grid, self.budget, "decode", 0)
        rows, number_bytes = _HEADS * self.q.shape[3], self.q.element_size()
        return work_of(rows, number_bytes, self.layout, self.q_grid, form, visited, compiled)

    def run(self, form: str, compiled: bool) -> None:
        """Attend once."""
        if form == "joined":
            dense.attend_joined(self.q, self.k, self.v, self.scale)
            return
        if form == "apart":
            dense.attend_apart(self.q, self.k, self.v, self.scale)
            return
        plan = self._sorted_plan() if self.sorts else self._plan()
        in_order.attend(
            native if compiled else gather, self.q, self.k, self.v, plan,
            scale=self.scale, key_bias=None, return_lse=False,
        )  # fmt: skip

    def _plan(self) -> BlockPlan:
        return plan_attention(
            self.q, self.k, self.layout, self.q_grid, budget=self.budget, scale=self.scale,
            role="decode", sink_latents=0,
        )  # fmt: skip

    def _sorted_plan(self) -> BlockPlan:
        keys = self.k[1]
        basis = basis_of(keys, _AXES, 0, 0)
        order = sort_keys(keys, basis, 0, self.layout.block_tokens)
        return plan_in_order(
            self.q, self.k, self.layout, self.q_grid, Buckets(order, basis),
            budget=self.budget, scale=self.scale, first=0,
        )  # fmt: skip


def _best_ms(calls: list[Callable[[], object]], rounds: int = _ROUNDS) -> list[float]:
    """Time calls in turns, so that all see the same machine; the best of each."""
    best = [float("inf")] * len(calls)
    for turn in range(rounds):
        if turn >= _ROUNDS // 4 and min(best) * 1e3 > _LONG_MS:
            break
        for n, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[n] = min(best[n], time.perf_counter() - start)
    return [max(seconds, 1e-9) * 1e3 for seconds in best]


def fit(work: list[tuple[float, float]], times_ms: list[float]) -> Form:
    """Draw the line with the least relative error; what would count negative costs nothing."""
    ms = torch.tensor(times_ms, dtype=torch.float64, device="cpu")
    ones = torch.ones_like(ms)[:, None]
    table = ms.new_tensor([(1.0, *row) for row in work]) / ms[:, None]
    unit = table.abs().amax(0).clamp_min(1e-30)
    kept = [n for n in range(3) if table[:, n].abs().max() > 0]
    while True:
        part = (table / unit)[:, kept]
        found = torch.linalg.lstsq(part, ones).solution[:, 0] / unit[kept]
        values = dict(zip(kept, found.tolist(), strict=True))  # sync-ok: on the host, once
        if min(values.values()) >= 0 or len(kept) == 1:
            break
        kept.remove(min(values, key=lambda n: values[n] * float(unit[n])))
    fixed, per_flop, per_byte = (max(values.get(n, 0.0), 0.0) for n in range(3))
    infinite = float("inf")
    return Form(
        fixed, 1 / per_flop if per_flop else infinite, 1 / per_byte if per_byte else infinite
    )


def _cache_path(
    dtype: torch.dtype, dim: int, threads: int, compiled: bool, sorts: bool = False
) -> Path:
    """Name the file by all that the constants depend on."""
    given = map(str, (dtype, dim, threads, compiled, sorts))
    parts = [native.machine(), *given, kernels_hash()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return native.cache_folder() / f"rates_{key}.json"
