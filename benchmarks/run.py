"""Time a kernel against dense attention, after its tests: a wrong kernel gets no figure."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lipass.kernels import block_sparse_attention, pool_blocks, select_blocks
from lipass.kernels.plan import BlockPlan, KvLayout

TILE = (4, 4, 4)
BUDGETS = (0.1, 0.3, 1.0)


class Case(NamedTuple):
    """One decode call: a chunk of queries against text, history and itself."""

    name: str
    heads: int
    dim: int
    history: tuple[int, int, int]
    current: tuple[int, int, int]
    text: int


CASES = {
    "cpu": (
        Case("tinyworld small", 3, 64, (20, 8, 8), (4, 8, 8), 32),
        Case("tinyworld base", 3, 64, (20, 16, 16), (4, 16, 16), 32),
    ),
    "cuda": (
        Case("tinyworld base", 3, 64, (20, 16, 16), (4, 16, 16), 32),
        Case("worldplay 480p", 16, 128, (20, 30, 52), (4, 30, 52), 512),
    ),
}


def main() -> int:
    """Run the tests of the operation, then its cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operation", choices=["block_sparse"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    tests = [sys.executable, "-m", "pytest", "-q", f"tests/kernels/test_{args.operation}.py"]
    if subprocess.run(tests, stdout=sys.stderr, check=False).returncode != 0:
        print("the tests of a kernel must pass before it is timed; see above", file=sys.stderr)
        return 1
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rows = [
        row
        for case in CASES[args.device]
        for row in _time_case(case, torch.device(args.device), dtype, args.repeats)
    ]
    if args.json:
        print(json.dumps({"schema_version": 1, "device": args.device, "rows": rows}, indent=1))
        return 0
    print(f"{'case':<16} budget density  dense ms  plan ms  sparse ms  speed-up (with plan)")
    for row in rows:
        print(
            f"{row['case']:<16} {row['budget']:6.2f} {row['density']:7.2f} {row['dense_ms']:9.2f} "
            f"{row['plan_ms']:8.2f} {row['sparse_ms']:10.2f} {row['speedup']:8.2f}x"
        )
    return 0


def _time_case(case: Case, device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict]:
    torch.manual_seed(0)
    roles = ("text", "history", "current")
    layout = KvLayout.build(roles, ((1, 1, case.text), case.history, case.current), TILE)
    q_grid = layout.segments[2].grid

    def random(tokens: int) -> torch.Tensor:
        return torch.randn(1, case.heads, tokens, case.dim, device=device, dtype=dtype)

    q = random(q_grid.tokens)
    keys = [random(segment.grid.tokens) for segment in layout.segments]
    values = [random(segment.grid.tokens) for segment in layout.segments]
    scale = case.dim**-0.5
    all_keys, all_values = torch.cat(keys, 2), torch.cat(values, 2)
    rows = []
    for budget in BUDGETS:

        def plan(budget: float = budget) -> BlockPlan:
            indices, counts = select_blocks(
                pool_blocks(q, q_grid),
                pool_blocks(keys[1], layout.segments[1].grid),
                layout,
                q_grid,
                budget=budget,
                scale=scale,
                role="decode",
                sink_latents=0,
            )
            return BlockPlan(indices, counts, q_grid, layout)

        made = plan()
        dense, planning, sparse = _interleaved(
            [
                lambda: F.scaled_dot_product_attention(q, all_keys, all_values),
                plan,
                lambda made=made: block_sparse_attention(q, keys, values, made, scale=scale),
            ],
            repeats,
            device,
        )
        rows.append(
            {
                "case": case.name,
                "budget": budget,
                "density": float(made.density()),
                "dense_ms": dense * 1e3,
                "plan_ms": planning * 1e3,
                "sparse_ms": sparse * 1e3,
                "speedup": dense / (planning + sparse),
            }
        )
    return rows


def _interleaved(calls: list[Callable], repeats: int, device: torch.device) -> list[float]:
    """Return the median seconds of each call; taking turns, so that all see the same machine."""
    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, seconds, strict=True):
            taken.append(_seconds(call, device))
    return [statistics.median(taken) for taken in seconds]


def _seconds(call: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
