"""Hold a user's file with a decode call in miniature, and a fresh Dynamo for every test."""

import sys
import textwrap

import pytest

WORLD = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x, text, history):
            q, k, v = self.qkv(x).view(1, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
            key, value = torch.cat([text, history, k], 2), torch.cat([text, history, v], 2)
            out = F.scaled_dot_product_attention(q, key, value)
            return x + F.dropout(out.transpose(1, 2).flatten(2), 0.1, self.training)

    class World(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(4, 32)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, latents, w2c, text, history):
            x = self.embed(latents.permute(0, 2, 3, 4, 1)).flatten(1, 3)
            for block in self.blocks:
                x = block(x, text, history)
            return x * w2c.mean()

    def decode():
        sizes = (1, 4, 4, 4, 4), (1, 8, 4, 4), (1, 2, 6, 16), (1, 2, 64, 16)
        return World().eval(), tuple(torch.randn(size) for size in sizes)
"""


@pytest.fixture
def world(tmp_path):
    """Return the target of a decode call with two sites."""
    path = tmp_path / "world_model.py"
    path.write_text(textwrap.dedent(WORLD))
    return f"{path}:decode"


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo):
    pass


@pytest.fixture(autouse=True)
def _own_path(monkeypatch):
    """Forget folders of targets: processes of later tests would import from them."""
    monkeypatch.setattr(sys, "path", [*sys.path])
