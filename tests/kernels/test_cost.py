"""The gate's prediction: what it must grow with, and that it is asked once per process."""

import pytest
import torch

from lipass.kernels import cost
from lipass.kernels.plan import BlockGrid, KvLayout

RATES = cost.Rates(flops_per_ms=50e6, bytes_per_ms=10e6, fixed_ms=0.5)
LAYOUT = KvLayout.build(
    ("text", "history", "current"), ((1, 1, 32), (20, 8, 8), (4, 8, 8)), (4, 4, 4)
)
GRID = BlockGrid((4, 8, 8), (4, 4, 4))


@pytest.fixture
def q(monkeypatch):
    monkeypatch.setattr(cost, "cpu_rates", lambda dtype, threads: RATES)
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


def test_larger_query_tiles_copy_less(q):
    small = cost.predict(q, LAYOUT, GRID, 10)[0]
    assert cost.predict(q, LAYOUT, BlockGrid((4, 8, 8), (4, 8, 8)), 10)[0] < small


def test_small_calls_stay_dense(q):
    layout = KvLayout.build(("current",), ((2, 8, 8),), (1, 8, 8))
    assert cost.why_dense(q[:, :, :128], layout, BlockGrid((2, 8, 8), (1, 8, 8)), 1)


def test_rates_are_measured_once():
    assert cost.cpu_rates(torch.float32, 1) is cost.cpu_rates(torch.float32, 1)
    assert cost.cpu_rates(torch.float32, 1).flops_per_ms > 0
