"""Compile small models whose keys are made of many things, and compare them with eager."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lipass
from lipass.receipt import reset_report

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Model(nn.Module):
    """4x4 tokens a latent; `attend` is what differs."""

    def __init__(self, attend):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(4, 32), nn.Linear(32, 96), nn.Linear(32, 4)
        self.q, self.kv, self.attend = nn.Linear(32, 32), nn.Linear(32, 64), attend

    def forward(self, x, *given):
        tokens = self.embed(x.permute(0, 2, 3, 4, 1)).flatten(1, 3)
        return self.head(self.attend(self, tokens, *given).transpose(1, 2).flatten(2))

    def own(self, tokens):
        return self.qkv(tokens).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)

    def text(self, words):
        return self.kv(words).unflatten(-1, (2, 2, 16)).permute(2, 0, 3, 1, 4)


def attend(q, keys, values):
    return F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2))


def history_last_but_text(model, tokens, text, history):
    q, k, v = model.own(tokens)
    return attend(q, [history, k, text], [history, v, text])


def two_histories(model, tokens, text, memory, window):
    q, k, v = model.own(tokens)
    return attend(q, [text, memory, window, k], [text, memory, window, v])


def history(model, tokens, past):
    q, k, v = model.own(tokens)
    return attend(q, [past, k], [past, v])


def projected_text(model, tokens, words, past):
    q, k, v = model.own(tokens)
    text = model.text(words)
    return attend(q, [text[0], past, k], [text[1], past, v])


def window_and_prompt(model, tokens, keys, values, words, start):
    q, k, v = model.own(tokens)
    stop = start + k.shape[2]
    keys[:, :, start:stop] = k
    values[:, :, start:stop] = v
    first = max(0, stop - 160)
    out = attend(q, [keys[:, :, first:stop]], [values[:, :, first:stop]])
    tokens = tokens + out.transpose(1, 2).flatten(2)
    q = model.q(tokens).unflatten(-1, (2, 16)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, *model.text(words))


def latents():
    return torch.randn(1, 4, 4, 4, 4)


def kv(tokens):
    return torch.randn(1, 2, tokens, 16)


def prompt():
    return torch.cat([torch.randn(1, 40, 32), torch.zeros(1, 88, 32)], 1)


EMPTY = torch.tensor([])
KINDS = {
    "history before text": (
        history_last_but_text,
        [(kv(6), kv(16 * n)) for n in (4, 6, 8)],
        {"other", "decode"},
    ),
    "memory and window": (
        two_histories,
        [(kv(6), kv(16 * n), kv(32 * n)) for n in (4, 6, 8)],
        {"other"},
    ),
    "no history at first": (history, [(kv(16 * n),) for n in (0, 4, 8)], {"self", "decode"}),
    "empty tensor at first": (history, [(EMPTY,), (kv(64),), (kv(96),)], {"self", "decode"}),
    "text that varies": (
        projected_text,
        [(torch.randn(1, 16 * n, 32), kv(32 * n)) for n in (2, 3, 4)],
        {"other", "decode"},
    ),
    "window of a cache, and a prompt": (
        window_and_prompt,
        [(kv(512), kv(512), prompt(), 64 * i) for i in range(5)],
        {"prefill", "decode", "cross"},
    ),
}


@pytest.mark.parametrize(
    "options", [{"preset": "exact"}, {"preset": "sparse", "sparse.budget": 1}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_keys(kind, options):
    reset_report()
    fn, calls, roles = KINDS[kind]
    model = Model(fn).eval()
    fast = torch.compile(model, backend="light_interaction", options={**options, "inner": "eager"})
    with torch.no_grad():
        for given in calls:
            x = latents()
            mine, theirs = (
                [g.clone() if isinstance(g, torch.Tensor) else g for g in given] for _ in range(2)
            )
            torch.testing.assert_close(fast(x, *mine), model(x, *theirs), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mine, theirs)
    report = lipass.report()
    assert not [one.failure for one in report.passes if one.failure]
    assert {site.role for site in report.sites.values()} == roles


def test_a_first_chunk_of_fixed_sizes_is_sparse_once_its_pieces_are_named():
    """A prompt and a history may be equally long, and nothing has varied yet."""

    def first(model, tokens, text, past):
        q, k, v = model.own(tokens)
        return attend(q, [text, past, k], [text, past, v])

    model = Model(first).eval()
    args = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 2, 32, 16), torch.randn(1, 2, 64, 16)
    options = {"preset": "sparse", "inner": "eager", "sparse.budget": 1.0, "strict": True}
    compiled = torch.compile(model, backend="light_interaction", options=options)
    with torch.no_grad(), pytest.raises(Exception, match=r"could be text or 2 .*\.segments"):
        compiled(*args)
    torch._dynamo.reset()
    reset_report()
    options |= {"find-attention.segments": ("text", "history", "current")}
    compiled = torch.compile(model, backend="light_interaction", options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), model(*args), atol=1e-5, rtol=1e-5)
    (site,) = lipass.report().sites.values()
    assert (site.role, site.action) == ("decode", "rewritten")
    assert site.segments == ("text", "history", "current")
