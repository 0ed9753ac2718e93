"""Time what one sparse call costs the host on a GPU: everything but the launches themselves.

    python -m benchmarks.host_cost            median of 1,000 calls, in microseconds
    python -m benchmarks.host_cost --profile  and what it is spent on

Runs without a GPU: tensors lie on the host, the GPU's providers are chosen for them, and launching
is replaced by nothing. So the figures leave out what Triton's launcher takes.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

import lipass.kernels.ops  # noqa: F401
from lipass.kernels import calibration, chip, planning, registry
from lipass.kernels.block_sparse import tma
from lipass.kernels.calibration import Form, Rates
from lipass.kernels.pool import triton as pool
from lipass.kernels.select import triton as select

_TEXT, _HISTORY, _CURRENT, _TILE = (1, 1, 929), (8, 30, 52), (4, 30, 52), (4, 8, 4)
_HEADS, _DIM = 2, 128  # of as many heads as there are, tables and checks know nothing


class _Launches:
    """Stands for a kernel; counts its launches."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, programs: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: object, **kwargs: object) -> None:
        self.count += 1


@contextlib.contextmanager
def launches_of_nothing() -> Iterator[dict[str, _Launches]]:
    """Let calls on the host take the path of a GPU, and launch nothing; give the stand-ins."""
    # Mocks that return a value take ten microseconds a call.
    always = lambda value: lambda *given: value  # noqa: E731
    made = {name: _Launches() for name in ("pool", "select", "attend")}
    fast, slow = Form(0.0, 1e15, 1e15), Form(1e3, 1.0, 1.0)
    rates = Rates(joined=slow, apart=None, sparse=fast)
    lists = {(name, "cpu"): registry._PROVIDERS[name, "cuda"] for name, _ in registry._PROVIDERS}
    with contextlib.ExitStack() as stack:
        for patched in (
            mock.patch.object(chip, "why_not", always(None)),
            mock.patch.object(chip, "capability", always((9, 0))),
            mock.patch.object(calibration, "cpu_rates", always(rates)),
            mock.patch.object(planning.native, "why_not_loaded", always("stands aside")),
            mock.patch.dict(registry._PROVIDERS, lists),
            # One call in 32 is looked at, which computes with a plan that nobody has made here.
            mock.patch.object(registry, "is_sampled", always(False)),
            mock.patch.object(pool, "pool_kernel", made["pool"]),
            mock.patch.object(select, "select_kernel", made["select"]),
            mock.patch.object(tma, "tma_kernel", made["attend"]),
        ):
            stack.enter_context(patched)
        yield made


def call(known_means: bool) -> Callable[[], Tensor]:
    """Return one call of decode."""
    grids = (_TEXT, _HISTORY, _CURRENT)
    tokens = [t * y * x for t, y, x in grids]

    def draw(length: int) -> Tensor:
        shape = (1, length, _HEADS, _DIM)
        return torch.zeros(shape, dtype=torch.bfloat16).transpose(1, 2)

    q, k, v = draw(tokens[-1]), [draw(n) for n in tokens], [draw(n) for n in tokens]
    flat = [size for grid in grids for size in grid]
    means = None
    if known_means:
        blocks = 2 * 4 * 13
        means = torch.zeros(1, _HEADS, blocks, _DIM)
    return lambda: torch.ops.lipass.sparse_attention.default(
        q, k, v, list(_CURRENT), flat, "text,history,current", list(_TILE), 0.3, _DIM**-0.5, 1,
        "decode", None, "host", history_means=means,
    )  # fmt: skip


def median_us(run: Callable[[], object], calls: int = 1000) -> float:
    """Return the median of so many calls, after some to fill caches."""
    for _ in range(20):
        run()
    taken = []
    for _ in range(calls):
        begin = time.perf_counter_ns()
        run()
        taken.append(time.perf_counter_ns() - begin)
    return statistics.median(taken) / 1e3


def main() -> int:
    """Print the figures as one document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with launches_of_nothing(), torch.inference_mode():
        run = call(known_means=True)
        print(
            json.dumps(
                {
                    "call_us": median_us(call(known_means=False), args.calls),
                    "call_with_known_means_us": median_us(run, args.calls),
                }
            )
        )
        if args.profile:
            with cProfile.Profile() as profile:
                for _ in range(args.calls):
                    run()
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
