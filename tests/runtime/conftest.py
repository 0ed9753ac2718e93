"""Let tests of what is kept between calls import their miniature."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `mini_decode`


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield
