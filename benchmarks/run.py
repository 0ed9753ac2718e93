"""Time block-sparse attention against dense attention, after its tests pass.

    python -m benchmarks.run                       a table
    python -m benchmarks.run --json                one document; its rows are described in `Row`
    python -m benchmarks.run --plot out.png        speed-up against density

Each case runs dense SDPA, the project's own kernel (planning included) and what `rivals.py` finds
here for the same blocks in turns, so that all see the same machine; figures are medians. Sizes for
the CPU are cut down from the models that they are called after.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import lipass.kernels.ops  # noqa: F401
from benchmarks.environment import environment
from benchmarks.rivals import rivals
from lipass.kernels import block_sparse_attention, prepare, registry
from lipass.kernels.block_sparse import native
from lipass.kernels.block_sparse.kind import Kind
from lipass.kernels.plan import BlockPlan, KvLayout, Triple
from lipass.kernels.planning import plan_attention
from lipass.kernels.pool.api import pool_blocks

DENSITIES = (0.1, 0.2, 0.3, 0.5, 1.0)
OWN = ("own", "chunk", "gate")
PROVIDERS = (*OWN, "mask", "flex", "gather", "flashinfer", "sparge")


class Case(NamedTuple):
    """One call: queries of the current chunk against text, history (decode) and themselves."""

    name: str
    heads: int
    dim: int
    text: int
    history: Triple
    current: Triple
    tile: Triple
    batch: int = 1

    @property
    def role(self) -> str:
        """Decode if there is a history, otherwise prefill."""
        return "decode" if self.history[0] else "prefill"


class Row(NamedTuple):
    """One measurement."""

    case: str
    queries: int
    keys: int
    heads: int
    head_dim: int
    device: str
    dtype: str
    provider: str
    """`cpu` or `cuda` for the project's own; `chunk` for it in all steps of a chunk but the first,
    where the means of the history are known; `gate` for the operator; the rest are rivals."""
    form: str
    """What ran of the own provider: native or gather on the CPU."""
    density: float
    seconds: float
    """Pool and select included."""
    dense_seconds: float
    speedup: float
    ideal: float
    """What visiting this share of the blocks could give at most."""
    select_share: float
    """Share of the seconds that pool and select take."""
    tflops: float
    """Rate over the visited blocks, pool and select included."""
    dense_tflops: float
    launches: int | None
    """Kernels that one call launches; None on a CPU."""


_NONE = (0, 1, 1)
CASES = {
    "cpu": (
        Case("tinyworld decode", 3, 64, 32, (20, 8, 8), (4, 8, 8), (1, 8, 8)),
        Case("tinyworld prefill", 3, 64, 32, _NONE, (20, 8, 8), (1, 8, 8)),
        Case("square 8x64", 8, 64, 0, (56, 8, 16), (8, 8, 16), (1, 8, 16)),
        Case("square 16x128", 16, 128, 0, (56, 8, 16), (8, 8, 16), (1, 8, 16)),
        Case("worldplay decode", 4, 128, 232, (8, 15, 26), (4, 15, 26), (4, 8, 4)),
        Case("worldplay prefill", 4, 128, 232, _NONE, (8, 15, 26), (4, 8, 4)),
        Case("matrix-game-3", 4, 128, 0, _NONE, (5, 22, 40), (4, 8, 4)),
        Case("self-forcing", 3, 128, 0, (18, 15, 26), (3, 15, 26), (3, 8, 4)),
        Case("sana-wm", 4, 112, 0, (12, 11, 20), (3, 11, 20), (3, 4, 10)),
    ),
    "cuda": (
        Case("tinyworld decode", 3, 64, 32, (20, 16, 16), (4, 16, 16), (4, 4, 4)),
        Case("worldplay decode", 16, 128, 929, (20, 30, 52), (4, 30, 52), (4, 8, 4), 2),
        Case("worldplay prefill", 16, 128, 929, _NONE, (20, 30, 52), (4, 8, 4), 2),
        Case("matrix-game-3", 24, 128, 0, _NONE, (20, 22, 40), (4, 8, 4)),
        # Tiles of 96 and 120 slots, as on the CPU, have no kernel; these lose least at borders.
        Case("self-forcing", 12, 128, 0, (18, 30, 52), (3, 30, 52), (1, 32, 4)),
        Case("sana-wm", 20, 112, 0, (12, 22, 40), (3, 22, 40), (1, 8, 8)),
    ),
}


def main() -> int:
    """Run the tests of the operation, then its cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operation", nargs="?", default="block_sparse", choices=["block_sparse"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", help="default: float32 bfloat16, on a GPU bfloat16")
    parser.add_argument("--case", nargs="+", help="only cases whose names contain one of these")
    parser.add_argument("--provider", nargs="+", default=PROVIDERS, choices=PROVIDERS)
    parser.add_argument("--density", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-up against density")
    args = parser.parse_args()
    tests = [sys.executable, "-m", "pytest", "-q", f"tests/kernels/test_{args.operation}.py"]
    if subprocess.run(tests, stdout=sys.stderr, check=False).returncode != 0:
        print("the tests of a kernel must pass before it is timed; see above", file=sys.stderr)
        return 1
    reason = prepare() if args.device == "cpu" else ""
    if reason:
        print(f"the native form is missing: {reason}", file=sys.stderr)
    names = args.dtype or (["bfloat16"] if args.device == "cuda" else ["float32", "bfloat16"])
    rows: list[Row] = []
    refused: list[dict[str, str]] = []
    for case in CASES[args.device]:
        if args.case and not any(part in case.name for part in args.case):
            continue
        for name in names:
            if reason := why_no_kernel(case, getattr(torch, name), torch.device(args.device)):
                refused.append({"case": case.name, "dtype": name, "reason": reason})
                print(f"{case.name} {name}: dense only, {reason}", file=sys.stderr)
            for row in _time_case(case, getattr(torch, name), args, refused):
                rows.append(row)
                if not args.json:
                    print(_line(row), flush=True)
    for line in _summary(rows):
        print(line, file=sys.stderr)
    if args.json:
        found = [row._asdict() for row in rows]
        document = {"schema_version": 5, "environment": environment(), "rows": found}
        document["refused"] = refused
        print(json.dumps(document, indent=1))
    if args.plot:
        _plot(rows, args.plot)
    return 0


def why_no_kernel(case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
    """Say why no block-sparse kernel takes a case, so that the operator is dense, or None."""
    layout = _layout(case)
    volume = layout.block_tokens
    kind = Kind(device, dtype, case.dim, volume, volume, records=False)
    found = registry.find("block_sparse", device, lambda module: module.why_not(kind))
    return found.reason if isinstance(found, registry.Refused) else None


def _layout(case: Case) -> KvLayout:
    roles, grids = ["text", "current"], [(1, 1, case.text), case.current]
    if case.role == "decode":
        roles.insert(1, "history")
        grids.insert(1, case.history)
    return KvLayout.build(tuple(roles), tuple(grids), case.tile)


def _time_case(
    case: Case, dtype: torch.dtype, args: argparse.Namespace, refused: list[dict[str, str]]
) -> list[Row]:
    torch.manual_seed(0)
    device = torch.device(args.device)
    layout = _layout(case)
    roles = [segment.role for segment in layout.segments]
    grids = [segment.grid.grid for segment in layout.segments]
    q_grid = layout.segments[-1].grid
    kernel = why_no_kernel(case, dtype, device) is None

    def random(tokens: int) -> Tensor:
        return torch.randn(case.batch, case.heads, tokens, case.dim, device=device, dtype=dtype)

    q = random(q_grid.tokens)
    keys, values = ([random(part.grid.tokens) for part in layout.segments] for _ in range(2))
    scale = case.dim**-0.5
    all_keys, all_values = torch.cat(keys, 2), torch.cat(values, 2)
    torch.compiler.reset()  # FlexAttention is compiled for the shapes of each case
    others = rivals(q, all_keys, all_values, scale)
    rows = []
    for budget in _budgets(case, layout, args.density):

        def plan(budget: float = budget, known: Tensor | None = None) -> BlockPlan:
            return plan_attention(
                q, keys, layout, q_grid, budget=budget, scale=scale, role=case.role,
                sink_latents=0, candidate_means=known,
            )  # fmt: skip

        made = plan()
        calls: dict[str, Callable[[], object]] = {
            "dense": lambda: F.scaled_dot_product_attention(q, all_keys, all_values, scale=scale),
            "plan": plan,
        }
        if "own" in args.provider and kernel:
            calls[device.type] = lambda plan=plan: block_sparse_attention(
                q, keys, values, plan(), scale=scale
            )
        if "chunk" in args.provider and kernel and case.role == "decode":
            known = pool_blocks(keys[1], layout.segments[1].grid)
            calls["plan of chunk"] = lambda plan=plan, known=known: plan(known=known)
            calls["chunk"] = lambda plan=plan, known=known: block_sparse_attention(
                q, keys, values, plan(known=known), scale=scale
            )
        if "gate" in args.provider:
            calls["gate"] = lambda budget=budget: torch.ops.lipass.sparse_attention(
                q, keys, values, list(q_grid.grid), [n for grid in grids for n in grid],
                ",".join(roles), list(case.tile), budget, scale, 0, case.role, None, "bench",
            )  # fmt: skip
        for name in [name for name in others if name in args.provider]:
            try:
                call = others[name](made)
                with torch.inference_mode():
                    call()
                calls[name] = call
            except (
                ValueError,
                RuntimeError,
            ) as error:  # too little memory, and what is not compiled
                reason = f"{name} at budget {budget:.2f}: {str(error)[:200]}"
                refused.append({"case": case.name, "dtype": str(dtype)[6:], "reason": reason})
                print(f"{case.name}: {reason}", file=sys.stderr)
        taken = dict(
            zip(calls, _interleaved(list(calls.values()), args.repeats, device), strict=True)
        )
        density = float(made.density())
        tflop = 4e-12 * case.batch * case.heads * q_grid.tokens * layout.tokens * case.dim
        built = device.type == "cpu" and native.why_not_loaded() is None
        for provider in [name for name in calls if name != "dense" and "plan" not in name]:
            own = provider in (device.type, *OWN)
            planning = taken.get(f"plan of {provider}", taken["plan"]) if own else 0.0
            rows.append(
                Row(
                    case=case.name,
                    queries=q_grid.tokens,
                    keys=layout.tokens,
                    heads=case.heads,
                    head_dim=case.dim,
                    device=device.type,
                    dtype=str(dtype).removeprefix("torch."),
                    provider=provider,
                    form=("native" if built else "gather") if provider in ("cpu", "chunk") else "",
                    density=density,
                    seconds=taken[provider],
                    dense_seconds=taken["dense"],
                    speedup=taken["dense"] / taken[provider],
                    ideal=1.0 / density,
                    select_share=min(planning / taken[provider], 1.0),
                    tflops=tflop * density / taken[provider],
                    dense_tflops=tflop / taken["dense"],
                    launches=_launches(calls[provider]) if device.type == "cuda" else None,
                )
            )
    return rows


def _budgets(case: Case, layout: KvLayout, densities: list[float]) -> list[float]:
    """Budgets that give these densities; what is protected anyway may be more than asked for."""
    segment = layout.candidate_segment(case.role)
    assert segment is not None
    candidates = layout.segments[segment].grid.blocks
    always = layout.blocks - candidates
    found = []
    for density in densities:
        wanted = density * layout.blocks - always
        if density == 1.0 or wanted >= 1.0:
            found.append(min(math.floor(wanted + 1e-9) / candidates, 1.0))
    return found


def _interleaved(calls: list[Callable], repeats: int, device: torch.device) -> list[float]:
    """Return the median seconds of each call; taking turns, so that all see the same machine."""
    seconds: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for call in calls * 2:
            call()
        for _ in range(repeats):
            for call, taken in zip(calls, seconds, strict=True):
                taken.append(_seconds(call, device))
    return [statistics.median(taken) for taken in seconds]


def _seconds(call: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _launches(call: Callable) -> int:
    """Count the kernels of one call on the GPU; copies and fills count too."""
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return len([event for event in profiler.events() if event.device_type.name == "CUDA"])


def _summary(rows: list[Row]) -> list[str]:
    """Say on how many rows the gate keeps what it is for, and who is faster than the kernel."""
    calls: dict[tuple[str, str, float], dict[str, Row]] = {}
    for row in rows:
        calls.setdefault((row.case, row.dtype, row.density), {})[row.provider] = row
    gated = [found for found in calls.values() if "gate" in found]
    lines = []
    if gated:
        least = min(found["gate"].speedup for found in gated)
        lines.append(f"gate: at least {least:.2f}x of dense on {len(gated)} rows")
    for rival in sorted({row.provider for row in rows} - {*OWN, "cpu", "cuda"}):
        both = [found for found in gated if rival in found]
        faster = sum(found["gate"].seconds < found[rival].seconds for found in both)
        lines.append(f"gate: faster than {rival} on {faster} of {len(both)} rows")
    return lines


def _line(row: Row) -> str:
    return (
        f"{row.case:<18} {row.dtype:<9} {row.provider:<10} {row.form:<7} density {row.density:.2f}"
        f"  {row.seconds * 1e3:9.2f} ms  dense {row.dense_seconds * 1e3:9.2f} ms"
        f"  {row.speedup:5.2f}x = {row.speedup / row.ideal:.2f} of ideal"
        f"  select {row.select_share:.0%}"
    )


def _plot(rows: list[Row], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    lines = sorted({(row.case, row.dtype, row.provider) for row in rows})
    for line in lines:
        found = [row for row in rows if (row.case, row.dtype, row.provider) == line]
        found.sort(key=lambda row: row.density)
        axes.plot(
            [row.density for row in found],
            [row.speedup for row in found],
            marker="o",
            label=" ".join(line),
        )
    ideal = sorted({row.density for row in rows})
    axes.plot(ideal, [1.0 / density for density in ideal], "k--", label="ideal")
    axes.set(xlabel="share of blocks visited", ylabel="speed-up over dense SDPA", yscale="log")
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
