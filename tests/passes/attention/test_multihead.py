"""`torch.nn.MultiheadAttention` becomes projections and attention that passes see."""

import pytest
import torch
from torch import nn

import lipass
from lipass.passes.attention.site import SDPA, site_of
from lipass.passes.graph.calls import is_call
from lipass.receipt import reset_report

TEXT = "canonicalize"
WHOLE = nn.functional.multi_head_attention_forward
L, LK, B, C = 6, 9, 2, 24

X, Y, Z = torch.randn(B, L, C), torch.randn(B, LK, C), torch.randn(B, LK, C)
HIDDEN_KEYS = torch.arange(LK)[None] >= torch.tensor([[LK], [5]])
HIDDEN = torch.zeros(L, LK, dtype=torch.bool).triu(4)
ADDED = torch.linspace(-2, 2, L * LK).view(L, LK)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)


def module(**given):
    return nn.MultiheadAttention(C, 4, **{"batch_first": True, **given}).eval()


ASKED = {
    "of itself": (module(), lambda m: m(X, X, X)[0]),
    "of itself, no weights": (module(), lambda m: m(X, X, X, need_weights=False)[0]),
    "without biases": (module(bias=False), lambda m: m(X, X, X)[0]),
    "of others": (module(), lambda m: m(X, Y, Z)[0]),
    "of another": (module(bias=False), lambda m: m(X, Y, Y)[0]),
    "of other widths": (
        module(kdim=8, vdim=10),
        lambda m: m(X, Y[..., :8], Z[..., :10], need_weights=False)[0],
    ),
    "tokens first": (module(batch_first=False), lambda m: m(X, X, X)[0]),
    "one of a batch": (module(), lambda m: m(X[0], X[0], X[0])[0]),
    "one of a batch, of another": (module(), lambda m: m(X[0], Y[0], Y[0])[0]),
    "hidden keys": (
        module(),
        lambda m: m(X, Y, Z, key_padding_mask=HIDDEN_KEYS, need_weights=False)[0],
    ),
    "hidden keys of one": (
        module(),
        lambda m: m(X[1], Y[1], Z[1], key_padding_mask=HIDDEN_KEYS[1], need_weights=False)[0],
    ),
    "hidden pairs": (module(), lambda m: m(X, Y, Z, attn_mask=HIDDEN, need_weights=False)[0]),
    "hidden pairs of each head": (
        module(),
        lambda m: m(X, Y, Z, attn_mask=HIDDEN.expand(4 * B, L, LK), need_weights=False)[0],
    ),
    "both": (
        module(),
        lambda m: m(
            X, Y, Z, key_padding_mask=HIDDEN_KEYS, attn_mask=HIDDEN, need_weights=False
        )[0],
    ),
    "added numbers": (
        module(),
        lambda m: m(X, Y, Z, attn_mask=ADDED, need_weights=False)[0],
    ),
    "causal": (
        module(),
        lambda m: m(X, X, X, attn_mask=CAUSAL, is_causal=True, need_weights=False)[0],
    ),
    "dropout that is off": (module(dropout=0.5), lambda m: m(X, X, X)[0]),
}  # fmt: skip

KEPT = {
    "weights that are read": (
        module(),
        lambda m: sum(x.sum() for x in m(X, X, X)),
        "weights are read",
    ),
    "a mask, and weights": (
        module(),
        lambda m: m(X, Y, Z, key_padding_mask=HIDDEN_KEYS)[0],
        "pass need_weights=False",
    ),
    "a key of its own": (module(add_bias_kv=True), lambda m: m(X, X, X)[0], "key of its own"),
    "a key of zeros": (module(add_zero_attn=True), lambda m: m(X, X, X)[0], "key of its own"),
    "dropout": (module(dropout=0.5).train(), lambda m: m(X, X, X)[0], "eval mode"),
}


def traced(trace, layer, ask):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return ask(self.layer) * x

    model = Model()
    with torch.no_grad():
        return trace(model, (torch.ones(1),)), model


@pytest.mark.parametrize(("layer", "ask"), ASKED.values(), ids=ASKED)
def test_result_is_that_of_the_module(layer, ask, trace, apply):
    gm, model = traced(trace, layer, ask)
    compiled = torch.compile(model, backend=lambda _, __: gm.forward)
    apply(gm, TEXT)
    assert not [node for node in gm.graph.nodes if is_call(node, WHOLE)]
    assert len([node for node in gm.graph.nodes if is_call(node, SDPA)]) == 1
    with torch.no_grad():
        torch.testing.assert_close(compiled(torch.ones(1)), ask(layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layer", "ask", "why"), KEPT.values(), ids=KEPT)
def test_what_is_more_than_projections_and_attention_is_kept(layer, ask, why, trace, apply):
    gm, _ = traced(trace, layer, ask)
    before = gm.code
    apply(gm, TEXT)
    assert gm.code == before
    (whole,) = [node for node in gm.graph.nodes if is_call(node, WHOLE)]
    assert site_of(whole).role == "other"
    assert why in site_of(whole).reason


class World(nn.Module):
    """Frames of tokens that attend to all frames by a module of torch."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv3d(4, 32, 1), nn.Linear(32, 4)
        self.attend = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x):
        h = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(h + self.attend(h, h, h)[0])


class ByHand(World):
    """The same, with a softmax of its own."""

    def forward(self, x):
        h = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in (h, h * 2, h * 3))
        out = torch.softmax(q @ k.mT * 0.25, -1) @ v
        return self.head(h + out.transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:attention can be made sparse where no gradient")
@pytest.mark.parametrize("kind", [World, ByHand])
@pytest.mark.parametrize("preset", ["exact", "sparse"])
def test_gradients_are_those_of_the_model(kind, preset, fresh_dynamo):
    model, x = kind().eval(), torch.randn(1, 4, 8, 16, 16)
    compiled = torch.compile(
        model, backend="light_interaction",
        options={"preset": preset, "inner": "aot_eager"},
    )  # fmt: skip
    found = []
    for call in (compiled, model):
        model.zero_grad()
        call(x).square().sum().backward()
        found.append([one.grad for one in model.parameters() if one.grad is not None])
    assert len(found[0]) == len(found[1])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3)


def test_strict_names_what_is_kept_of_it(fresh_dynamo):
    model = World().eval()
    model.attend = nn.MultiheadAttention(32, 2, batch_first=True, add_bias_kv=True)
    given = {"preset": "sparse", "inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="light_interaction", options=given)
    with torch.no_grad(), pytest.raises(Exception, match=r"strict: [^$]*it adds a key"):
        compiled(torch.randn(1, 4, 8, 16, 16))


def test_blocks_of_it_are_left_out_where_its_grid_is_shown(fresh_dynamo):
    reset_report()
    model, x = World().eval(), torch.randn(1, 4, 8, 16, 16)
    given = {"preset": "sparse", "inner": "eager", "strict": True, "sparse.dense_tokens": 0}
    for budget, close in ((1.0, True), (0.25, False)):
        torch._dynamo.reset()
        compiled = torch.compile(
            model, backend="light_interaction",
            options={**given, "sparse.budget_self": budget, "sparse.tile": (1, 8, 8)},
        )  # fmt: skip
        with torch.no_grad(), lipass.Session(preset="sparse"):
            out, wanted = compiled(x), model(x)
        assert torch.allclose(out, wanted, atol=1e-5) is close
    assert {site.action for site in lipass.report().sites.values()} == {"rewritten"}
