import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    torch._dynamo.reset()
    yield importlib.import_module("benchmarks.long_rollout").measure
    torch._dynamo.reset()


def test_rollout_compiles_nothing_late_and_leaves_nothing_behind(measure):
    # The context is at its longest from the fifth chunk on.
    found = measure(chunks=10, preset="all", inner="eager")
    assert found["chunks"] == 10
    assert found["graphs_after_warm_up"] == 0
    assert not found["session_outlives_its_block"]
