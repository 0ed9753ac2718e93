"""The gate's prediction: what it must grow with, and that what it chooses is the faster one."""

import time

import pytest
import torch
from kernel_cases import NO_NATIVE, make_case

import lipass.kernels.ops  # noqa: F401
from lipass.kernels import cost, registry
from lipass.kernels.plan import BlockGrid, KvLayout

RATES = cost.Rates(
    dense_flops_per_ms=50e6, sparse_flops_per_ms=45e6, bytes_per_ms=10e6, fixed_ms=0.5
)
LAYOUT = KvLayout.build(
    ("text", "history", "current"), ((1, 1, 32), (20, 8, 8), (4, 8, 8)), (4, 4, 4)
)
GRID = BlockGrid((4, 8, 8), (4, 4, 4))


@pytest.fixture
def q(monkeypatch):
    monkeypatch.setattr(cost, "cpu_rates", lambda dtype, threads, form: RATES)
    return torch.zeros(1, 3, 256, 64)


def test_sparse_time_grows_with_visited_blocks(q):
    times = [cost.predict(q, LAYOUT, GRID, visited)[0] for visited in (1, 5, 10, 25)]
    assert times == sorted(times)
    assert len(set(times)) == 4


def test_dense_time_does_not_depend_on_the_plan(q):
    assert cost.predict(q, LAYOUT, GRID, 1)[1] == cost.predict(q, LAYOUT, GRID, 25)[1]


def test_a_full_plan_is_slower_than_dense(q):
    sparse_ms, dense_ms = cost.predict(q, LAYOUT, GRID, LAYOUT.blocks)
    assert sparse_ms > dense_ms
    expected = f"predicted {sparse_ms:.2f} ms sparse vs {dense_ms:.2f} ms dense"
    assert cost.why_dense(q, LAYOUT, GRID, LAYOUT.blocks) == expected


def test_gathering_copies_less_for_larger_query_tiles(q, monkeypatch):
    monkeypatch.setattr(cost.native, "why_not_loaded", lambda: "not built")
    small = cost.predict(q, LAYOUT, GRID, 10)[0]
    assert cost.predict(q, LAYOUT, BlockGrid((4, 8, 8), (4, 8, 8)), 10)[0] < small


def test_tiles_that_lie_in_runs_are_not_copied(q, monkeypatch):
    monkeypatch.setattr(cost.native, "why_not_loaded", lambda: None)
    runs = KvLayout.build(
        ("text", "history", "current"), ((1, 1, 32), (20, 8, 8), (4, 8, 8)), (1, 8, 8)
    )
    grid = BlockGrid((4, 8, 8), (1, 8, 8))
    assert cost.predict(q, runs, grid, 10)[0] < cost.predict(q, LAYOUT, GRID, 10)[0]


def test_small_calls_stay_dense(q):
    layout = KvLayout.build(("current",), ((2, 8, 8),), (1, 8, 8))
    assert cost.why_dense(q[:, :, :128], layout, BlockGrid((2, 8, 8), (1, 8, 8)), 1)


@pytest.mark.parametrize("form", ["gather", "native"])
def test_rates_are_measured_once(form):
    if form == "native" and NO_NATIVE:
        pytest.skip(NO_NATIVE)
    found = cost.cpu_rates(torch.float32, 1, form)
    assert found is cost.cpu_rates(torch.float32, 1, form)
    assert min(found) > 0


def seconds(calls):
    """Time calls in turns and give the best of each: a busy machine only ever adds."""
    best = [float("inf")] * len(calls)
    for _ in range(9):
        for n, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[n] = min(best[n], time.perf_counter() - start)
    return best


# Measured with AMX: bf16 prefill of 12 and 20 latents is predicted wrong at budgets 0.4 and 0.8.
_WRONG = pytest.mark.xfail(reason="the bf16 constants are of decode shapes", strict=False)


@pytest.mark.parametrize(
    ("role", "dtype"),
    [
        ("decode", torch.float32),
        ("prefill", torch.float32),
        ("decode", torch.bfloat16),
        pytest.param("prefill", torch.bfloat16, marks=_WRONG),
    ],
)
def test_choice_is_within_a_tenth_of_the_better_one(role, dtype):
    wrong = []
    for frames in (5, 12, 20):
        for budget in (0.1, 0.4, 0.8, 0.95):
            case = make_case(
                role, frames, (8, 8), 32, (1, 8, 8), budget=budget, heads=3, dim=64,
                dtype=dtype, new_frames=4,
            )  # fmt: skip
            # What is wrong once may be noise; what is wrong three times is the gate.
            if all(regret(case) > 1.1 for _ in range(3)):
                wrong.append((frames, budget))
    # One of twelve may sit where both forms take the same time on this machine.
    assert len(wrong) <= 1, wrong


def regret(case):
    """How much longer the chosen form takes than the better one."""
    options = case.options
    grids = [size for part in case.layout.segments for size in part.grid.grid]
    roles = ",".join(part.role for part in case.layout.segments)

    def attend():
        torch.ops.lipass.sparse_attention(
            case.q, case.keys, case.values, list(case.q_grid.grid), grids, roles, [1, 8, 8],
            options["budget"], options["scale"], 1, options["role"], None, "cost",
        )  # fmt: skip

    def sparse():
        with registry.force("sparse"):
            attend()

    def dense():
        with registry.force("dense"):
            attend()

    times = seconds([sparse, dense])
    registry.reset_telemetry()
    attend()
    # Dense attention may run in the compiled kernel too; the counts say which route was taken.
    kept_dense = registry.telemetry()["cost"].dense_calls == 1
    return times[kept_dense] / min(times)
