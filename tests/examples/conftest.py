"""Models of the examples that have learned nothing, small and quick."""

import pytest
import torch

from lipass.examples.tinyworld.stream import StreamWorld


@pytest.fixture(scope="session")
def untrained_stream():
    """Return what makes a streaming model of a configuration, always with the same weights."""

    def make(config) -> StreamWorld:
        torch.manual_seed(0)
        tiny = StreamWorld(config)
        for parameter in tiny.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return tiny.eval().requires_grad_(False)

    return make
