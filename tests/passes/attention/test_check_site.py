from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lipass.passes.attention.check_site import form, wrong
from lipass.passes.attention.match import Operands, attention
from lipass.passes.attention.site import SDPA, AttentionSite, KeySegment

TEXT = KeySegment("text", 6, (1, 1, 6), "")
HISTORY = KeySegment("history", 32, (2, 4, 4), "")
CURRENT = KeySegment("current", 64, (4, 4, 4), "")
DECODE = AttentionSite("layer", "", "decode", (4, 4, 4), (TEXT, HISTORY, CURRENT), 8**-0.5)

INPUTS = tuple(torch.randn(1, 2, tokens, 8) for tokens in (64, 6, 32, 64))


@pytest.fixture
def matched(trace):
    """Return the attention call of a function with its operands."""

    def run(fn, *args):
        (call,) = trace(fn, args or INPUTS).graph.find_nodes(op="call_function", target=SDPA)
        return call, attention(call)

    return run


def attend(q, *pieces, **options):
    v = torch.cat([piece + 1 for piece in pieces], 2)
    return F.scaled_dot_product_attention(q, torch.cat(pieces, 2), v, **options)


def grouped(q, *pieces):
    return attend(q, *(piece[:, :1] for piece in pieces), enable_gqa=True)


@pytest.mark.parametrize(
    "fn",
    [attend, grouped, lambda q, text, history, _: attend(q, text, history, q)],
    ids=["plain", "grouped heads", "queries as keys"],
)
def test_attention_that_is_equal(matched, fn):
    assert wrong(*matched(fn), DECODE) is None


def test_graph_is_left_as_it_is(matched):
    call, operands = matched(attend)
    before = str(call.graph)
    wrong(call, operands, DECODE)
    assert str(call.graph) == before


@pytest.mark.parametrize(
    "mix_up",
    [
        lambda x: replace(x, values=(*x.values[:2], x.keys[2])),
        lambda x: replace(x, q=x.keys[2], keys=(*x.keys[:2], x.q)),
    ],
    ids=["keys for own values", "queries for own keys"],
)
def test_operands_that_are_mixed_up(matched, mix_up):
    call, operands = matched(attend)
    assert wrong(call, mix_up(operands), DECODE).startswith("its ")


def test_scale_that_is_lost(matched):
    why = wrong(*matched(attend), replace(DECODE, scale=1.0))
    assert why.startswith("its value changes by ")


def test_one_tensor_as_two_pieces_of_two_lengths(matched):
    call, operands = matched(lambda q, text, history, own: attend(q, history, history, own))
    assert wrong(call, operands, DECODE) == "one tensor is two of its pieces"


def test_attention_that_reads_more_than_its_operands(matched):
    def fn(q, text, history, own, mask):
        return attend(q, text, history, own, attn_mask=mask)

    call, _ = matched(fn, *INPUTS, torch.zeros(64, 102))
    keys, values = (tuple(call.args[i].args[0]) for i in (1, 2))
    why = wrong(call, Operands(call.args[0], keys, values, DECODE.scale), DECODE)
    assert why == "it does not run on small inputs: it also depends on %l_mask_"


def test_form_is_that_of_another_layer(matched):
    assert form(*matched(attend), DECODE) == form(*matched(attend), replace(DECODE, name="other"))


@pytest.mark.parametrize(
    ("name", "other"), [("scale", 1.0), ("role", "prefill"), ("segments", (TEXT, CURRENT))]
)
def test_form_of_another_site(matched, name, other):
    site = replace(DECODE, **{name: other})
    assert form(*matched(attend), DECODE) != form(*matched(attend), site)


@pytest.mark.parametrize(
    "fn",
    [
        lambda *given: attend(*given, scale=8**-0.5),
        lambda q, text, history, own: attend(q, text, history, q),
    ],
    ids=["scale that is written", "queries as keys"],
)
def test_form_of_another_call(matched, fn):
    assert form(*matched(attend), DECODE) != form(*matched(fn), DECODE)
