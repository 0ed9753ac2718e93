"""Give pytest a world model in miniature; use with `pytest_plugins = ["lipass.testing.fixtures"]`.

The model has what passes look for: a text segment, a history that grows, cameras, two equal
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipass.kernels import registry
from lipass.receipt import reset_report


class MiniWorld(nn.Module):
    """Denoise 4 latents of 4x4 tokens against 6 text tokens and a history; width 32, 2 heads."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 96) for _ in range(blocks))
        self.camera = nn.Linear(12, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, latents: Tensor, w2c: Tensor, text: Tensor, history: Tensor) -> Tensor:
        """Take `[B, 4, T, Y, X]`, `[B, F, 4, 4]` and keys that serve as values `[B, H, L, D]`."""
        b, _, t, y, x = latents.shape
        h = self.embed(latents.permute(0, 2, 3, 4, 1))
        h = (h + self.camera(w2c[:, -t:, :3].flatten(2))[:, :, None, None]).flatten(1, 3)
        for qkv in self.blocks:
            q, k, v = qkv(h).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            key, value = torch.cat([text, history, k], 2), torch.cat([text, history, v], 2)
            h = h + F.scaled_dot_product_attention(q, key, value).transpose(1, 2).flatten(2)
        return self.head(h).view(b, t, y, x, 4).permute(0, 4, 1, 2, 3)


@pytest.fixture
def mini_world() -> nn.Module:
    """Return a decode model with fixed random weights."""
    torch.manual_seed(0)
    return MiniWorld().eval()


@pytest.fixture
def mini_world_inputs() -> Callable[[int], tuple[Any, ...]]:
    """Return a function from the number of history latents to the arguments of `mini_world`."""

    def make(history_latents: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(history_latents)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        w2c = torch.eye(4).repeat(1, history_latents + 4, 1, 1)
        w2c[0, :, 0, 3] = torch.linspace(0, 3, history_latents + 4)
        history = draw(1, 2, history_latents * 16, 16)
        return draw(1, 4, 4, 4, 4), w2c, draw(1, 2, 6, 16), history

    return make


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Forget compiled functions, reports and counts in front of a test and behind it."""

    def forget() -> None:
        torch._dynamo.reset()
        reset_report()
        registry.reset_telemetry()

    forget()
    yield
    forget()
