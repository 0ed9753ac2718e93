"""What a session costs beyond a call stays small; the bound is generous, as machines are busy."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def measure(monkeypatch, fresh_dynamo):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return importlib.import_module("benchmarks.session_overhead").measure


def test_call_in_a_step_costs_little_more_than_a_bare_one(measure):
    found = measure(chunks=60)
    assert found["call_us"] > 0
    assert found["overhead_us"] < 200
    assert found["store_us"] < 200
    assert found["looked_up_call_us"] < found["call_us"] + 200
