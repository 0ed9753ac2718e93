"""Attention that no site shows, under `strict`."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lipass
from lipass.testing.fixtures import MiniWorld

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {
    "preset": "sparse",
    "inner": "eager",
    "strict": True,
    "find-attention.segments": ("history", "current"),
}


@torch.library.custom_op("lipass_tests::attend", mutates_args=())
def attend_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@attend_op.register_fake
def _(q, k, v):
    return torch.empty_like(q)


class Model(nn.Module):
    """Tokens, history, and whatever attends to them."""

    def __init__(self, attend):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(4, 32), nn.Linear(32, 96), nn.Linear(32, 4)
        self.attend = attend

    def forward(self, x, history):
        h = self.embed(x.permute(0, 2, 3, 4, 1)).flatten(1, 3)
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        o = self.attend(q, torch.cat([history, k], 2), torch.cat([history, v], 2))
        return self.head(h + o.transpose(1, 2).flatten(2))


@torch.compiler.disable
def disabled(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@torch.compiler.disable
def disabled_operator(q, k, v):
    return torch.ops.lipass_tests.attend(q, k, v)


@torch.compiler.disable
def disabled_by_hand(q, k, v):
    return torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 4, -1) @ v


class Disabled(nn.Module):
    @torch.compiler.disable
    def forward(self, q, k, v):
        return self.inner(q, k, v)

    def inner(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


inner_compiled = torch.compile(plain, backend="eager")


@torch.compiler.disable
def inside_disabled(q, k, v):
    return inner_compiled(q, k, v)


def broken(q, k, v):
    torch._dynamo.graph_break()
    return disabled(q, k, v)


def unknown_einsum(q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).exp()
    return torch.einsum("bhqk,bhkd->bhqd", scores / scores.sum(-1, keepdim=True), v)


def operator(q, k, v):
    return torch.ops.lipass_tests.attend(q, k, v)


def run(attend, **options):
    run_model(Model(attend), **options)


def run_model(model, **options):
    given = OPTIONS | options
    fast = torch.compile(model.eval(), backend="light_interaction", options=given)
    with torch.no_grad():
        for latents in (2, 3):
            fast(torch.randn(1, 4, 4, 4, 4), torch.randn(1, 2, 16 * latents, 16))


@pytest.mark.parametrize(
    ("attend", "words"),
    [
        (disabled, r"scaled_dot_product_attention at test_hidden\.py:\d+ in disabled"),
        (Disabled(), r"scaled_dot_product_attention at .* in Disabled\.inner"),
        (disabled_operator, r"the operator lipass_tests\S*attend at .* in disabled_operator"),
        (disabled_by_hand, r"softmax at .* in disabled_by_hand"),
        (inside_disabled, r"scaled_dot_product_attention at"),
        (broken, r"scaled_dot_product_attention at .* in disabled"),
        (operator, r"the operator lipass_tests\S*attend\S* at test_hidden\.py:\d+, which no pass"),
        (unknown_einsum, r"a exp between two products at test_hidden\.py:\d+|stay dense"),
        (
            lambda q, k, v: q * k.mean() + v.mean(),
            "got none in Model.forward: no graph has a site",
        ),
    ],
    ids=[
        "function",
        "method of a module",
        "operator in it",
        "by hand in it",
        "compiled inside",
        "behind a break",
        "operator in the graph",
        "einsum",
        "no attention",
    ],
)
def test_strict_names_attention_that_no_site_shows(attend, words):
    with pytest.raises(Exception, match=f"strict: [^$]*({words})"):
        run(attend)


@torch.library.custom_op("lipass_tests::packed_attention", mutates_args=())
def packed_op(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, kv[0], kv[1])


@packed_op.register_fake
def _(q, kv):
    return torch.empty_like(q)


def packed(q, k, v):
    return torch.ops.lipass_tests.packed_attention(q, torch.stack([k, v]))


def checkpointed(q, k, v):
    return checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=False)


def branch(q, k, v):
    return torch.cond(q.sum() > 0, plain, lambda q, k, v: plain(q, k, v) * 1.0, (q, k, v))


@pytest.mark.parametrize(
    ("attend", "words"),
    [
        (packed, "packed_attention"),
        (checkpointed, "scaled_dot_product_attention"),
        (branch, "scaled_dot_product_attention"),
    ],
    ids=["packed keys", "checkpoint", "branch"],
)
def test_strict_names_hidden_attention_beside_a_site(attend, words):
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = attend

        def forward(self, q, k, v):
            return plain(q, k, v) + self.attend(q, k, v)

    with pytest.raises(Exception, match=f"strict: every attention must be a site, got .*{words}"):
        run(Beside())
    assert sys.getprofile() is None


@torch.compiler.disable
def harmless(x):
    q, k, v = x, x, x
    return q * torch.softmax((q + k + v).mean((2, 3, 4), keepdim=True), 1)


class Beside(Model):
    """Run other code between two graphs."""

    def __init__(self):
        super().__init__(F.scaled_dot_product_attention)

    def forward(self, x, history):
        return super().forward(harmless(x * 2), history)


def routed(q, k, v):
    gates = torch.softmax(q.mean(2) @ torch.ones(16, 16), -1)
    return F.scaled_dot_product_attention(q, k, v) * gates[:, :, None]


@pytest.mark.parametrize(
    "attend",
    [F.scaled_dot_product_attention, inner_compiled, routed],
    ids=["seen", "compiled by itself", "gates"],
)
def test_strict_takes_attention_that_is_seen(attend):
    run(attend)
    assert sys.getprofile() is None


def test_other_code_between_graphs_is_no_attention():
    run_model(Beside())
    assert sys.getprofile() is None


def test_error_of_a_later_graph_is_not_hidden():
    def resumed(q, k, v):
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, k, v)

    with pytest.raises(Exception, match="no reshape from"):
        run(resumed)
    assert sys.getprofile() is None


def test_attention_of_others_behind_the_call_is_not_the_models():
    fast = torch.compile(Beside().eval(), backend="light_interaction", options=OPTIONS)
    with torch.no_grad():
        for latents in (2, 3, 4):
            fast(torch.randn(1, 4, 4, 4, 4), torch.randn(1, 2, 16 * latents, 16))
            q = torch.randn(1, 2, 4, 8)
            F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("attend", [disabled, operator, unknown_einsum])
def test_only_strict_looks(attend):
    run(attend, strict=False)
    run(attend, preset="cache")


def test_profile_of_somebody_else_is_left_alone():
    calls = []
    sys.setprofile(lambda *event: calls.append(event[1]))
    mine = sys.getprofile()
    try:
        run(disabled)
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(None)


def test_strict_miniature_passes(mini_world_inputs):
    options = {"preset": "all", "inner": "eager", "strict": True}
    fast = torch.compile(MiniWorld().eval(), backend="light_interaction", options=options)
    with torch.no_grad():
        for latents in (2, 3):
            fast(*mini_world_inputs(latents))
    assert lipass.report().sites
