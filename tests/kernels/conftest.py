"""Let the kernel tests share `kernel_cases`, and keep them quick on a busy machine."""

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
