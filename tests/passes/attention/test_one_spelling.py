from dataclasses import replace

import pytest
import torch
from spellings import flash_attn_func, swap

from lipass.passes.attention.match import Refusal
from lipass.passes.attention.one_spelling import other_spelling, spell_as_sdpa, wrong
from lipass.passes.attention.site import SDPA
from lipass.passes.core import PassContext
from lipass.passes.graph.equivalence import Incomparable

INPUTS = tuple(torch.randn(1, 2, tokens, 4) for tokens in (3, 5, 5))


@pytest.fixture
def found(trace):
    """Return the attention of a function that is no SDPA call."""

    def run(fn, *args):
        said = [other_spelling(node) for node in trace(fn, args or INPUTS).graph.nodes]
        (one,) = (x for x in said if x is not None)
        return one

    return run


def rewritten(spelled):
    graph = spelled.root.graph
    spell_as_sdpa(spelled, PassContext.of(graph))
    graph.eliminate_dead_code()
    return graph.find_nodes(op="call_function", target=SDPA)[0]


def by_hand(q, k, v):
    return (q @ k.mT * 0.5).softmax(-1) @ v


def joined(q, k, v):
    return by_hand(q.flatten(0, 1), k.flatten(0, 1), v.reshape(2, 5, 4))


def grouped(q, k, v):
    return flash_attn_func(swap(q), swap(k)[:, :, :1], swap(v)[:, :, :1])


def changed_since(q, k, v):
    q = q + 1
    q3 = q.flatten(0, 1)
    q.zero_()
    return by_hand(q3, k.flatten(0, 1), v.flatten(0, 1))


def test_batch_and_heads_that_were_joined_are_taken_apart(found):
    call = rewritten(found(joined))
    assert [x.name for x in call.args] == ["l_q_", "l_k_", "l_v_"]
    assert [(user.target, user.args[1:]) for user in call.users] == [("flatten", (0, 1))]


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda q, k, v: by_hand(q[0], k[0], v[0]), id="never joined"),
        pytest.param(lambda q, k, v: by_hand(q.flatten(0, 1), k[0], v[0]), id="only q joined"),
        pytest.param(lambda *x: by_hand(*(y.reshape(4, -1, 2) for y in x)), id="other features"),
        pytest.param(changed_since, id="changed since"),
    ],
)
def test_three_axes_that_get_a_batch_of_one(found, fn):
    call = rewritten(found(fn))
    assert [x.target for x in call.args] == ["unsqueeze"] * 3


@pytest.mark.parametrize(
    ("fn", "options"),
    [
        (by_hand, {}),
        (lambda q, k, v: (q @ k.mT / 4**0.5).softmax(-1) @ v, {}),
        (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, {"scale": 1.0}),
        (grouped, {"enable_gqa": True}),
    ],
    ids=["default scale", "its inverse", "no scale", "grouped heads"],
)
def test_options_are_what_differs_from_the_default(found, fn, options):
    one = found(fn)
    assert wrong(one) is None
    assert rewritten(one).kwargs == options


def test_rewrite_with_another_scale_is_wrong(found):
    assert wrong(replace(found(by_hand), scale=0.51)).startswith("its value changes by ")


def test_one_tensor_in_two_layouts_is_not_tried(found):
    one = found(lambda x: by_hand(x, x.transpose(1, 2), x), torch.randn(1, 3, 3, 4))
    assert wrong(one) == "%l_x_ is used in two layouts"


def test_attention_that_reads_more_than_its_operands_is_incomparable(found):
    def fn(q, k, v, other):
        return (q @ k.mT).softmax(-1).type_as(other) @ v

    with pytest.raises(Incomparable, match="it also depends on %l_other_"):
        wrong(found(fn, *INPUTS, torch.ones(1)))


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda q, k, v: (q @ k.mT).softmax(-1).tril() @ v, "%tril masks its weights"),
        (lambda q, *_: flash_attn_func(q, q, q, softcap=2.0), "softcap of flash_attn_func is 2.0"),
    ],
    ids=["by hand", "flash_attn"],
)
def test_what_only_looks_like_plain_attention(found, fn, why):
    assert found(fn) == Refusal(why)
