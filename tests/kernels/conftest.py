"""Let the kernel tests share `kernel_cases`, and give hypothesis time on a busy machine."""

import sys
from pathlib import Path

from hypothesis import settings

# Tests are collected in importlib mode, which puts no folder of theirs on the path.
sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("kernels", deadline=None, derandomize=True, database=None)
settings.load_profile("kernels")
