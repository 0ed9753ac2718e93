"""Queries that hold text and latents: latents become sparse, text stays dense."""

import pytest
import torch
from torch.nn import functional as F

from lipass.kernels import registry
from lipass.passes.attention.site import sites
from lipass.receipt import current_report


def heads(x):
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


def tokens(x):
    return (x + 1).flatten(2).mT


def attend(q, mask=None):
    return F.scaled_dot_product_attention(q, q * 2, q * 3, attn_mask=mask)


def behind(x, words):
    return attend(heads(torch.cat([tokens(x), words], 1)))


def in_front(x, words):
    return attend(heads(torch.cat([words, tokens(x)], 1)))


def of_heads(x, words):
    return attend(torch.cat([heads(words), heads(tokens(x))], 2))


def padded(x, words):
    q = torch.cat([heads(words), heads(tokens(x))], 2)
    mask = torch.arange(q.shape[2]) > 1
    return attend(q, mask[None, None, None])


def biased(x, words):
    q = torch.cat([heads(tokens(x)), heads(words)], 2)
    return attend(q, torch.linspace(0, 1, q.shape[2])[None, None, None])


def two_prompts(x, words):
    return attend(heads(torch.cat([words, words + 1, tokens(x)], 1)))


def given(n=4, words=5):
    return torch.randn(1, 16, n, 4, 4), torch.randn(1, words, 16)


@pytest.fixture
def compiled(fresh_dynamo):
    """Return a function that compiles with a budget."""

    def run(fn, budget=1.0):
        options = {"preset": "sparse", "inner": "eager", "sparse.sink_latents": 0}
        options |= {"sparse.budget": budget, "sparse.tile": (1, 2, 2)}
        return torch.compile(fn, backend="light_interaction", options=options)

    return run


@pytest.mark.parametrize("grown", [(4, 5), (6, 5), (4, 7)], ids=["fixed", "latents", "text"])
@pytest.mark.parametrize("fn", [behind, in_front, of_heads, padded, biased, two_prompts])
def test_budget_one_equals_dense(compiled, fn, grown):
    fast = compiled(fn)
    with torch.no_grad():
        for args in (given(), given(*grown)):
            torch.testing.assert_close(fast(*args), fn(*args))
    found = {(one.role, one.segments, one.action) for one in current_report().sites.values()}
    assert found == {("self", ("text", "current"), "rewritten")}


def test_text_rows_see_every_key(compiled):
    args = given()
    with torch.no_grad(), registry.force("sparse"):
        out, dense = compiled(in_front, 0.01)(*args), in_front(*args)
    torch.testing.assert_close(out[:, :, :5], dense[:, :, :5])
    assert not torch.allclose(out[:, :, 5:], dense[:, :, 5:])


def test_latents_between_texts_stay(trace, apply):
    def fn(x, words):
        return attend(heads(torch.cat([words, tokens(x), words], 1)))

    gm = trace(fn, given())
    apply(gm, "canonicalize,find-attention,sparse-attention")
    ((_, site),) = sites(gm.graph)
    assert site.role == "text"
