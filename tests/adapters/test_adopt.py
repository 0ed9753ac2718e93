"""What a model hides from Dynamo is shown, listed, and put back exactly."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipass

_SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn

@torch.compiler.disable
def hidden_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return hidden_attention(q[:, None], k[:, None], v[:, None])[:, 0]
"""


@pytest.fixture
def stranger():
    """Yield a module of somebody else's code, whose attention is hidden from Dynamo."""
    module = types.ModuleType("stranger_model")
    sys.modules["stranger_model"] = module
    exec(compile(_SOURCE, "stranger_model.py", "exec"), vars(module))
    yield module
    del sys.modules["stranger_model"]


def test_disabled_attention_is_shown_and_put_back(stranger, fresh_dynamo):
    model, x = stranger.Block(), torch.randn(1, 8, 16)
    before = stranger.hidden_attention
    expected = model(x)
    adoption = lipass.adopt(model)
    assert [one.where for one in adoption.changes] == ["stranger_model.py:6"]
    fast = torch.compile(
        model, backend="light_interaction", options={"inner": "eager"}, fullgraph=True
    )
    with torch.no_grad():
        assert torch.equal(fast(x), expected)
    adoption.undo()
    assert stranger.hidden_attention is before
    adoption.undo()


def test_nothing_is_bound_where_nothing_is_hidden():
    adoption = lipass.adopt(nn.Linear(2, 2))
    assert adoption.changes == []
    assert adoption.family == "any"


def test_attributes_of_an_object_come_back_as_they_were(stranger):
    model = stranger.Block()
    with lipass.adopt(model, family="any") as adoption:
        adoption.rebind(model, "forward", F.relu, "a test")
        assert "forward" in vars(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("given", [3, object(), None])
def test_what_is_no_model_is_refused(given):
    with pytest.raises(TypeError, match=r"must be a torch\.nn.Module or hold one"):
        lipass.adopt(given)


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="family must be one of any"):
        lipass.adopt(nn.Linear(2, 2), family="nobody")
