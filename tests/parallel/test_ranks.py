"""Ranks that share attention and a session get what one process gets."""

import json

import checks
import pytest
import torch.multiprocessing as mp


@pytest.fixture(scope="module", params=[2, 4])
def told(request, tmp_path_factory):
    """How each check went on each rank; all of them run in one start of the ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(checks.run, (request.param, str(folder)), nprocs=request.param)
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(request.param)]


@pytest.mark.parametrize("name", checks.CHECKS)
def test_on_every_rank(told, name):
    failures = [f"rank {n}: {one[name]}" for n, one in enumerate(told) if one.get(name)]
    assert not failures, "\n".join(failures)
    assert all(name in one for one in told), "not reached: an earlier check failed"
