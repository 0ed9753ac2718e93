"""Let the kernel tests share `kernel_cases` and machines, and keep them quick on a busy one."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Tests are collected in importlib mode, which puts no folder of theirs on the path.
sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("kernels", deadline=None, derandomize=True, database=None)
settings.load_profile("kernels")


@pytest.fixture(autouse=True)
def _one_thread():
    """Run on one thread: for tensors this small two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["native", "no compiler"])
def machine(request, monkeypatch):
    """Run with the compiled kernel and as on a machine where it can not be built."""
    from kernel_cases import NO_NATIVE

    from lipass.kernels.block_sparse import native

    if request.param == "native" and NO_NATIVE:
        pytest.skip(NO_NATIVE)
    if request.param == "no compiler":
        monkeypatch.setattr(native, "why_not_loaded", lambda: "no compiler")
    return request.param
