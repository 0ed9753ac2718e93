"""What a model hides from Dynamo is shown, listed, and put back exactly."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipass
from lipass.adapters.adoption import Adoption
from lipass.receipt import reset_report

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


def test_options_that_an_adapter_tells_hold_until_undo(stranger, fresh_dynamo):
    model, x = stranger.Block(), torch.randn(1, 8, 16)
    with lipass.adopt(model, family="any") as adoption:
        adoption.tell(model, {"find-attention.token_grid": (2, 4)}, "its tokens show no grid")
        assert adoption.changes[-1].where == "stranger_model.py:15"
        roles = [site.role for site in _sites_of(model, x)]
        # An option that the user gives wins.
        given = [site.role for site in _sites_of(model, x, {"find-attention.token_grid": (3, 5)})]
        inside = [site.role for site in _sites_of(nn.Sequential(model), x)]
    assert roles == inside == ["self"]
    assert given == ["other"]
    with lipass.adopt(model, family="any"):
        assert [site.role for site in _sites_of(model, x)] == ["text"]


def _sites_of(model, x, options=None):
    torch._dynamo.reset()
    reset_report()
    given = {"inner": "eager", "preset": "exact", **(options or {})}
    with torch.no_grad():
        torch.compile(model, backend="light_interaction", options=given)(x)
    return list(lipass.report().sites.values())


def test_a_drive_is_undone_by_itself(stranger):
    class Pipeline:
        transformer = None

    pipeline = Pipeline()
    pipeline.transformer = stranger.Block()
    adoption = Adoption("any", lambda _, bound: bound.rebind(pipeline, "steps", 2, "a test"))
    with adoption.drive(None) as bound:
        assert pipeline.steps == 2
        assert [one.name for one in bound.changes] == ["steps"]
    assert not hasattr(pipeline, "steps")


def test_strict_refuses_a_model_with_attention_that_stays_hidden(stranger, fresh_dynamo):
    model, x = stranger.Block(), torch.randn(1, 8, 16)
    with lipass.adopt(model, family="any") as adoption:
        adoption.lint(stranger.hidden_attention, "hidden_attention", "opaque", model)
        with pytest.raises(Exception, match=r"strict: .* got stranger_model.py:6 .*: opaque"):
            _sites_of(nn.Sequential(model), x, {"strict": True})
        assert [site.role for site in _sites_of(model, x)] == ["text"]
    with lipass.adopt(model, family="any"):
        assert [site.role for site in _sites_of(model, x, {"strict": True})] == ["text"]


def test_a_model_whose_names_are_those_of_a_family_and_whose_arguments_are_not_is_of_none():
    def forward(self, x, t, context, seq_len):
        return x

    kind = type("WanModel", (nn.Module,), {"forward": forward, "__module__": "wan.modules.model"})
    with lipass.adopt(kind()) as adoption:
        assert adoption.family == "any"
