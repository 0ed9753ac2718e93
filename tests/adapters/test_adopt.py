"""What a model hides from Dynamo is shown, listed, and put back exactly."""

import gc
import sys
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipass
from lipass.adapters.adoption import Adoption, options_told, refuse_lints
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


@pytest.fixture(params=[True, False], ids=["the first goes first", "the last goes first"])
def in_turn(request):
    """Return what puts two adoptions in the order in which they are undone."""
    return lambda first, last: (first, last) if request.param else (last, first)


@pytest.mark.parametrize("models", [1, 2])
def test_two_adoptions_of_one_code_are_undone_in_any_order(stranger, in_turn, models):
    made = [stranger.Block() for _ in range(models)]
    before = stranger.hidden_attention
    one, other = in_turn(lipass.adopt(made[0]), lipass.adopt(made[-1]))
    assert [str(each) for each in one.changes] == [str(each) for each in other.changes]
    shown = stranger.hidden_attention
    assert shown is not before
    one.undo()
    assert stranger.hidden_attention is shown
    other.undo()
    assert stranger.hidden_attention is before


def test_what_wraps_one_name_twice_is_undone_in_any_order(stranger, in_turn):
    def wrap(adoption, word):
        own = stranger.Block.__call__
        adoption.rebind(stranger.Block, "__call__", lambda *x: (word, own(*x)), "a test")
        return word

    adoptions = Adoption("any"), Adoption("any")
    words = [wrap(one, word) for one, word in zip(adoptions, "ab", strict=True)]
    (first, _), (last, word) = in_turn(*zip(adoptions, words, strict=True))
    first.undo()
    assert stranger.Block()(torch.randn(1, 8, 16))[0] == word
    last.undo()
    assert "__call__" not in vars(stranger.Block)


def test_an_adoption_that_nobody_keeps_does_not_keep_its_model(stranger):
    model = stranger.Block()
    gone = weakref.ref(model)
    lipass.adopt(model).rebind(model, "forward", None, "a test")
    del model
    gc.collect()
    assert gone() is None


def test_each_adoption_takes_back_only_what_it_has_told(stranger, in_turn):
    model, tokens = stranger.Block(), {"find-attention.token_grid": (2, 4)}
    adoptions = Adoption("any"), Adoption("any")
    for one in adoptions:
        one.tell(model, dict(tokens), "a test")
        one.lint(stranger.hidden_attention, "hidden_attention", "opaque", model)
    first, last = in_turn(*adoptions)
    first.undo()
    assert options_told(model) == tokens
    with pytest.raises(lipass.LipassError, match=r"strict: .* opaque"):
        refuse_lints(model)
    last.undo()
    assert options_told(model) == {}
    refuse_lints(model)


def test_an_undo_that_fails_puts_back_all_else_and_says_so(stranger):
    model, before = stranger.Block(), stranger.hidden_attention
    adoption = lipass.adopt(model)
    adoption.tell(model, {"find-attention.token_grid": (2, 4)}, "a test")
    adoption.at_undo(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adoption.undo()
    assert stranger.hidden_attention is before
    assert options_told(model) == {}
    adoption.undo()


def test_a_model_whose_names_are_those_of_a_family_and_whose_arguments_are_not_is_of_none():
    def forward(self, x, t, context, seq_len):
        return x

    kind = type("WanModel", (nn.Module,), {"forward": forward, "__module__": "wan.modules.model"})
    with lipass.adopt(kind()) as adoption:
        assert adoption.family == "any"
