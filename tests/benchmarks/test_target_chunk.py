import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def target_chunk(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    torch._dynamo.reset()
    yield importlib.import_module("benchmarks.target_chunk")
    torch._dynamo.reset()


def test_others_work_in_the_second_and_last_quarter(target_chunk):
    own = [target_chunk.busy(chunk) for chunk in range(-4, 64)]
    assert own == [False] * 20 + [True] * 16 + [False] * 16 + [True] * 16


def test_others_work_as_long_of_fewer_chunks(target_chunk):
    own = [target_chunk.busy(chunk, 8) for chunk in range(8)]
    assert own == [False, False, True, True] * 2


def test_others_end_with_the_block(target_chunk):
    with target_chunk.burners(1) as others:
        others.on(True)
        process = others._running[0]
        assert process.poll() is None
    assert process.poll() is not None
