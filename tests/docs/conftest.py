"""Let tests of the docs import their helper, and compile without an inner compiler."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `page_blocks`


@pytest.fixture
def compiles(monkeypatch, fresh_dynamo):
    """Return the options that pages compile with; their inner compiler is `eager` here.

    `nn.Module.compile` calls `torch.compile`, so it is one of them.
    """
    compile_, given = torch.compile, []

    def eager(model=None, **asked):
        if asked.get("backend") != "light_interaction":  # what packages do as they are imported
            return compile_(model, **asked)
        given.append(asked.pop("options", None) or {"preset": asked["mode"]})
        assert asked.keys() <= {"backend", "mode"}
        return compile_(
            model, backend="light_interaction", options={**given[-1], "inner": "eager"}
        )

    monkeypatch.setattr(torch, "compile", eager)
    return given
