"""Attention that is no SDPA: operators that an adapter declares, sites that it attaches."""

import pytest
import torch
from torch.nn import functional as F

from lipass.passes.attention import match, operators
from lipass.passes.attention.match import Operands, Refusal
from lipass.passes.attention.operators import declare
from lipass.passes.attention.site import (
    AttentionSite,
    KeySegment,
    OperandPlaces,
    set_site,
    sites,
)
from lipass.passes.attention.sparse_call import SparseCall
from lipass.passes.graph.arguments import overload_of
from lipass.passes.graph.compat import value

TEXT = "canonicalize,find-attention"
SPARSE = f"{TEXT},sparse-attention{{budget_decode=0.5 tile=1x4x4}}"


@torch.library.custom_op("adapter::attend", mutates_args=())
def attend(
    v: torch.Tensor, q: torch.Tensor, k: torch.Tensor, temperature: float = 0.25
) -> torch.Tensor:
    """Attend in an order of arguments of its own."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=temperature)


@attend.register_fake
def _(v, q, k, temperature=0.25):
    return torch.empty_like(q)


OPERATOR = torch.ops.adapter.attend.default
PLACES = OperandPlaces("q", "k", "v", scale="temperature")


@pytest.fixture
def declared(monkeypatch):
    monkeypatch.setattr(operators, "_declared", {})
    declare(OPERATOR, PLACES)


def is_operator(node):
    return overload_of(node.target) is OPERATOR


class Layer(torch.nn.Module):
    """A layer whose attention nobody sees through."""

    def __init__(self, scale=None, heads=2):
        super().__init__()
        self.qkv = torch.nn.Linear(48, 96)
        self.scale, self.heads = scale, heads

    def forward(self, x, k_old, v_old):
        b, t, y, w, _ = x.shape
        tokens = self.qkv(x.flatten(1, 3))
        q, k, v = tokens.view(b, t * y * w, 3, 2, 16).permute(2, 0, 3, 1, 4)
        k, v = k[:, : self.heads], v[:, : self.heads]
        k, v = torch.cat([k_old, k], 2), torch.cat([v_old, v], 2)
        named = {} if self.scale is None else {"temperature": self.scale}
        return torch.ops.adapter.attend(v, q, k=k, **named).transpose(1, 2).reshape(b, t, y, w, 32)


def inputs(latents, heads=2):
    cache = torch.randn(1, heads, latents * 16, 16)
    return torch.randn(1, 2, 4, 4, 48), cache, cache.clone()


def found(gm):
    ((node, site),) = sites(gm.graph)
    return node, site


def test_it_is_described_by_the_same_rules(declared, trace, apply):
    gm = trace(Layer(), inputs(3), inputs(5))
    apply(gm, TEXT)
    node, site = found(gm)
    assert is_operator(node)
    assert site.role == "decode", site.reason
    assert [one.role for one in site.segments] == ["history", "current"]
    assert (site.q_grid, site.scale, site.operands) == ((2, 4, 4), 0.25, PLACES)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("heads", [2, 1])
def test_it_is_rewritten_and_equal_at_budget_one(declared, trace, apply, scale, heads):
    model = Layer(scale, heads).eval()
    gm = trace(model, inputs(3, heads), inputs(5, heads))
    apply(gm, SPARSE.replace("0.5", "1.0"))
    (node,) = SparseCall.nodes(gm.graph)
    assert SparseCall.of(node).scale == (scale or 0.25)
    assert not any(map(is_operator, gm.graph.nodes))
    x, k, v = inputs(4, heads)
    by_name = {"x": x, "k_old": k, "v_old": v}
    with torch.no_grad():
        expected = model(x, k, v)
        gm.recompile()
        out = gm(*arguments_of(gm, model, by_name))
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-5)


def arguments_of(gm, model, by_name):
    """Order inputs as the placeholders of Dynamo do."""
    args = []
    for node in gm.graph.find_nodes(op="placeholder"):
        given = value(node)
        if isinstance(given, torch.SymInt):
            args.append(by_name["k_old"].shape[2])
        elif isinstance(given, torch.nn.Parameter):
            args.append(model.qkv.weight if given.dim() == 2 else model.qkv.bias)
        else:
            args.append(next(t for name, t in by_name.items() if f"l_{name}_" in node.name))
    return args


def test_it_is_left_alone_where_nobody_has_declared_it(trace, apply):
    gm = trace(Layer(), inputs(3), inputs(5))
    apply(gm, SPARSE)
    assert sites(gm.graph) == []


def test_exact_passes_do_not_replace_it(declared, trace, apply):
    """It may compute in another precision on purpose; only what approximates takes its place."""
    gm = trace(Layer(), inputs(3), inputs(5))
    apply(gm, f"{TEXT},collapse-keys,attend-pieces")
    assert is_operator(found(gm)[0])


def test_an_operator_that_is_no_plain_attention_is_kept(declared, trace, apply):
    """What it computes is compared with the sparse call, whatever was declared."""
    operators._declared[OPERATOR] = PLACES._replace(q="k", k="q")
    gm = trace(Layer(), inputs(2))
    apply(gm, TEXT)
    assert found(gm)[1].role == "other"
    operators._declared[OPERATOR] = PLACES._replace(scale=0.5)
    gm = trace(Layer(), inputs(3), inputs(5))
    apply(gm, TEXT)
    _, site = found(gm)
    assert site.role == "other"
    assert "sparse call at budget 1.0 is not equal" in site.reason


def test_places_stay_true_while_the_graph_in_front_changes(declared, trace, apply):
    gm = trace(Layer(), inputs(3), inputs(5))
    apply(gm, TEXT)
    node, _ = found(gm)
    q = match.attention(node).q
    with gm.graph.inserting_after(q):
        copy = gm.graph.call_method("contiguous", (q,))
        copy.meta["example_value"] = value(q).contiguous()
    node.replace_input_with(q, copy)
    operands = match.attention(node)
    assert isinstance(operands, Operands)
    assert operands.q is copy
    assert len(operands.keys) == 2


def test_a_site_that_an_adapter_attached_says_where_its_operands_are(trace, apply):
    gm = trace(Layer(), inputs(3), inputs(5))
    (node,) = [one for one in gm.graph.nodes if is_operator(one)]
    assert isinstance(match.attention(node), Refusal)
    grid, latents = (2, 4, 4), value(node.kwargs["k"]).shape[2] // 16 - 2
    segments = (
        KeySegment("history", latents * 16, (latents, 4, 4), "the adapter knows"),
        KeySegment("current", 32, grid, "the adapter knows"),
    )
    set_site(node, AttentionSite("layer", "", "decode", grid, segments, 0.25, operands=PLACES))
    apply(gm, SPARSE)
    (sparse,) = SparseCall.nodes(gm.graph)
    assert SparseCall.of(sparse).roles == ("history", "current")


def test_places_that_are_no_arguments_are_refused():
    with pytest.raises(ValueError, match=r"must name arguments of .* got keys; it has v, q, k"):
        declare(OPERATOR, OperandPlaces("q", "keys", "v"))
