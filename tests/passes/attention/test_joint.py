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


def both_padded(x, words):
    """Rows and columns of padded words are hidden, as HunyuanVideo 1.5 has it."""
    q = torch.cat([heads(tokens(x)), heads(words)], 2)
    seen = F.pad(torch.arange(words.shape[1])[None] < 3, (q.shape[2] - words.shape[1], 0), value=1)
    row = seen.bool().view(1, 1, 1, -1).repeat(1, 1, q.shape[2], 1)
    return attend(q, row & row.transpose(2, 3))[:, :, : 3 - words.shape[1]]


def both_hidden(x, words):
    q = torch.cat([heads(words), heads(tokens(x))], 2)
    shown = torch.ones(1, q.shape[2] - words.shape[1], dtype=torch.bool)
    seen = torch.cat([torch.arange(words.shape[1])[None] > 1, shown], 1)
    row = seen[:, None, None].expand(-1, -1, q.shape[2], -1)
    return attend(q, torch.logical_and(row.mT, row))[:, :, 2:]


def repeated_row(x, words):
    q = torch.cat([heads(tokens(x)), heads(words)], 2)
    row = (torch.arange(q.shape[2]) > 1)[None, None, None]
    return attend(q, row.expand(-1, -1, q.shape[2], -1))


def two_prompts(x, words):
    return attend(heads(torch.cat([words, words + 1, tokens(x)], 1)))


def given(n=4, words=5):
    return torch.randn(1, 16, n, 4, 4), torch.randn(1, words, 16)


FORMS = [
    behind, in_front, of_heads, padded, biased, two_prompts, both_padded, both_hidden, repeated_row
]  # fmt: skip


@pytest.fixture
def compiled(fresh_dynamo):
    """Return a function that compiles with a budget."""

    def run(fn, budget=1.0):
        options = {"preset": "sparse", "inner": "eager", "sparse.sink_latents": 0}
        options |= {"sparse.budget": budget, "sparse.tile": (1, 2, 2)}
        return torch.compile(fn, backend="light_interaction", options=options)

    return run


@pytest.mark.parametrize("grown", [(4, 5), (6, 5), (4, 7)], ids=["fixed", "latents", "text"])
@pytest.mark.parametrize("fn", FORMS)
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


@pytest.mark.parametrize(
    "shown", ["other width", "hidden", "no transpose", "written", "row written", "key written"]
)
def test_a_mask_that_may_differ_between_latents_stays(trace, apply, shown):
    def fn(x, words):
        q = torch.cat([heads(tokens(x)), heads(words)], 2)
        length = q.shape[2]
        if shown == "other width":  # the first of the latents are padded, not all
            seen = F.pad(torch.arange(9)[None] < 3, (length - 9, 0), value=1)
        else:
            seen = F.pad(torch.arange(5)[None] < 3, (length - 5, 0), value=int(shown != "hidden"))
        seen = seen.bool()
        if shown == "key written":
            seen[:, :2] = False
        row = seen.view(1, 1, 1, -1).repeat(1, 1, length, 1)
        if shown == "row written":
            row[:, :, :32, 32:] = False
        other = row.flip(3).transpose(2, 3) if shown == "no transpose" else row.transpose(2, 3)
        mask = row & other
        if shown == "written":
            mask[:, :, :32, 32:] = False
        return attend(q, mask)

    gm = trace(fn, given())
    apply(gm, "canonicalize,find-attention,sparse-attention")
    ((_, site),) = sites(gm.graph)
    assert (site.role, "may differ between queries" in site.reason) == ("other", True)


@pytest.mark.parametrize("grid", [(4, 4, 4), (4, 4)])
@pytest.mark.parametrize("words", [5, 16])
def test_latents_that_are_packed_outside_are_told_by_their_grid(compiled, grid, words):
    def fn(packed, words):
        return attend(torch.cat([heads(words), heads(packed)], 2))

    args = torch.randn(1, 64, 16), torch.randn(1, words, 16)
    options = {"preset": "sparse", "inner": "eager", "sparse.budget": 1.0}
    fast = torch.compile(
        fn, backend="light_interaction", options={**options, "sparse.token_grid": grid}
    )
    with torch.no_grad():
        torch.testing.assert_close(fast(*args), fn(*args))
    (found,) = current_report().sites.values()
    told = len(grid) == 3 or words == 5
    # words that are as many as a frame has tokens are one, unless the number of frames is given
    expected = ("4", "4", "4") if told else ("5", "4", "4")
    assert tuple(map(str, found.grid)) == expected
    assert found.segments == (("text", "current") if told else ("current",))
