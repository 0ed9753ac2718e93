"""Give every test one seed and two threads, and the kernels memory that is poisoned."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty_memory(request):
    """Fill `torch.empty` with NaN (integers: the largest value), so that unwritten output is seen.

    Only for tests/kernels: the mode adds fill nodes to traced graphs, and goldens must not show
    them.
    """
    if "tests/kernels" not in request.path.as_posix():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs CUDA, and none is available")
    for item in items:
        if "needs_gpu" in item.keywords:
            item.add_marker(skip)
