import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from lipass.passes.graph.marks import invariants
from lipass.passes.printer import print_graph
from lipass.testing import assert_rewrites

FACTS = "canonicalize,find-attention,find-poses,find-steps"
TEXT = f"{FACTS},hoist-calls{{work_min=0 counted_writes=true}}"


class Net(nn.Module):
    """Tokens that attend to a projected prompt."""

    def __init__(self, fixed=None):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(4, 8)
        self.fixed = fixed or (lambda text: text)

    def forward(self, x, text):
        q = self.query(x).unflatten(-1, (2, 4)).transpose(1, 2)
        k = self.key(self.fixed(text)).unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


X, PROMPT = torch.randn(1, 6, 8), torch.randn(1, 5, 4)


def bodies(gm):
    return [gm.get_submodule(call.target) for call in invariants(gm.graph)]


def said(records):
    return [(note.action, note.reason) for note in records[-1].notes]


def test_projected_prompt_is_outlined(trace, apply):
    gm = trace(Net(), (X, PROMPT))
    records, _ = apply(gm, TEXT)
    assert_expected_inline(
        records[-1].diff,
        """\
+%invariant_0 = invariant_0($text; 2 parameters)
+%getitem: f32[1, 2, 5, 4] = getitem(%invariant_0, 0)
-%linear_1: f32[1, 5, 8] = linear($text, $key.weight, $key.bias)  # key
-%unflatten_1: f32[1, 5, 2, 4] = %linear_1.unflatten(-1, (2, 4))
-%k: f32[1, 2, 5, 4] = %unflatten_1.transpose(1, 2)
-%scaled_dot_product_attention: f32[1, 2, 6, 4] = scaled_dot_product_attention(%q, %k, %k)
+%scaled_dot_product_attention: f32[1, 2, 6, 4] = scaled_dot_product_attention(%q, %getitem, %getitem)
""",  # noqa: E501
    )
    assert said(records) == [("rewritten", "3 calls run once for the same text")]
    assert_expected_inline(
        print_graph(bodies(gm)[0].graph),
        """\
$text: f32[1, 5, 4] = input
%linear_1: f32[1, 5, 8] = linear($text, $key.weight, $key.bias)  # key
%unflatten_1: f32[1, 5, 2, 4] = %linear_1.unflatten(-1, (2, 4))
%k: f32[1, 2, 5, 4] = %unflatten_1.transpose(1, 2)
return (%k)
""",
    )


def test_prompt_whose_dtype_alone_the_queries_take_is_outlined(trace, apply):
    """As Wan's conditioning does with the embedding of the time."""

    class Typed(Net):
        def forward(self, x, text):
            return super().forward(x.type_as(text), text)

    records, _ = apply(trace(Typed(), (X, PROMPT)), TEXT)
    assert said(records) == [("rewritten", "3 calls run once for the same text")]


def test_prompt_that_the_queries_are_computed_from_stays(trace, apply):
    class Modulated(Net):
        def forward(self, x, text):
            return super().forward(x + text.mean(), text)

    records, _ = apply(trace(Modulated(), (X, PROMPT)), TEXT)
    assert not records[-1].changed


def test_outlined_call_computes_the_same_to_the_bit(trace, apply):
    net = Net()
    gm = trace(net, (X, PROMPT))
    compiled = torch.compile(net, backend=lambda _, __: gm.forward)
    apply(gm, TEXT)
    with torch.no_grad():
        assert torch.equal(compiled(X, PROMPT), net(X, PROMPT))


def test_cameras_and_prompt_have_a_body_each(trace, apply, mini, inputs):
    def fn(noise, level, w2c, text, history):
        keys = [(k.exp(), v) for k, v in text]
        return mini(noise, level, torch.linalg.inv(w2c), keys, history)

    gm = trace(fn, inputs(8).decode, inputs(12).decode)
    records, _ = apply(gm, TEXT)
    reasons = [reason for _, reason in said(records)]
    assert len(reasons) == 3
    assert reasons[0].endswith("for the same text_0_0")
    assert any(reason.endswith("for the same w2c") for reason in reasons)


def test_tables_of_parameters_are_outlined(trace, apply):
    class Table(Net):
        def forward(self, x, text):
            return super().forward(x * self.query.bias.exp(), text)

    records, _ = apply(trace(Table(), (X, PROMPT)), TEXT)
    assert ("rewritten", "1 call run once for the same parameters") in said(records)


def test_size_that_grows_reaches_the_body():
    net = Net(lambda text: text[:, 1:].sin())
    grown = X, torch.randn(1, 7, 4)
    assert_rewrites(net, (X, PROMPT), TEXT, adds="invariant_0(", grown=grown)


def of_the_query(net):
    return lambda x, text: net(x + text.mean(), text)


def of_the_tokens(net):
    return lambda x, text: net(x, text + x.mean())


def noisy(net):
    return lambda x, text: net(x, F.dropout(text, 0.5, training=True))


def returned(net):
    def fn(x, text):
        keys = text.sin()
        k = keys[None].expand(1, 1, -1, -1).repeat(1, 2, 1, 1)
        return F.scaled_dot_product_attention(x.view(1, 2, 6, 4), k, k), keys

    return fn


def written(net):
    def fn(x, text):
        text.mul_(2)
        return net(x, text)

    return fn


@pytest.mark.parametrize("made", [of_the_query, of_the_tokens, noisy, written])
def test_what_a_call_changes_is_computed_in_each(made, trace, apply):
    gm = trace(made(Net()), (X, PROMPT.clone()))
    records, _ = apply(gm, TEXT)
    assert not [reason for _, reason in said(records) if "text" in reason]
    assert not invariants(gm.graph)


def test_returned_results_are_computed_in_each_call(trace, apply):
    gm = trace(returned(None), (X, PROMPT))
    apply(gm, TEXT)
    assert gm.graph.find_nodes(op="call_method", target="sin")


def test_views_stay(trace, apply):
    def fn(x, text):
        k = text.view(1, 5, 1, 4).transpose(1, 2).expand(1, 2, 5, 4)
        return F.scaled_dot_product_attention(x.view(1, 2, 6, 4).sin(), k, k)

    records, _ = apply(trace(fn, (X, PROMPT)), TEXT)
    assert said(records) == [("kept", "no large product depends on what calls leave alone")]


def test_what_runs_in_an_autocast_stays(trace, apply):
    net = Net()

    def fn(x, text):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x, text)

    records, _ = apply(trace(fn, (X, PROMPT)), TEXT)
    assert said(records) == [("kept", "no large product depends on what calls leave alone")]


def test_loop_in_the_graph_stays(trace, apply):
    net = Net()

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, sigma, text):
            return self.net(x * sigma, text)

    model = Timed()

    def fn(x, sigmas, text):
        for i in range(2):
            x = x + model(x, sigmas[i], text)
        return x

    records, _ = apply(trace(fn, (X, torch.ones(2), PROMPT)), TEXT)
    assert said(records) == [("kept", "the loop is in the graph, where hoist-steps sees it")]


def test_differentiated_results_stay(apply):
    graphs = []

    def keep(gm, _):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Net(), backend=keep)(X, PROMPT)
    records, _ = apply(graphs[0], TEXT)
    assert not records[-1].changed


def test_second_body_reads_the_first(trace, apply):
    """What cameras and prompt determine together comes behind what one of them does."""

    class Both(Net):
        def forward(self, x, text, other):
            q = self.query(x).unflatten(-1, (2, 4)).transpose(1, 2)
            a = self.key(text).unflatten(-1, (2, 4)).transpose(1, 2)
            b = self.key(other).unflatten(-1, (2, 4)).transpose(1, 2)
            first = F.scaled_dot_product_attention(q, a, a)
            return F.scaled_dot_product_attention(first, b, b) * (a.sum() * b.sum())

    net, other = Both(), torch.randn(1, 3, 4)
    gm = trace(net, (X, PROMPT, other))
    compiled = torch.compile(net, backend=lambda _, __: gm.forward)
    apply(gm, TEXT)
    calls = invariants(gm.graph)
    assert len(calls) == 3
    assert {call.name for call in calls[:2]} == {
        one.args[0].name for one in calls[2].all_input_nodes if one.args
    }
    with torch.no_grad():
        expected = net(X, PROMPT, other)
        torch.testing.assert_close(compiled(X, PROMPT, other), expected, rtol=0, atol=0)


def test_conjugates_that_are_only_marked_stay(trace, apply):
    net = Net(lambda text: torch.view_as_real(torch.fft.fft(text).conj().resolve_conj())[..., 0])
    gm = trace(net, (X, PROMPT))
    apply(gm, TEXT)
    (call,) = invariants(gm.graph)
    assert not any(out.is_conj() for out in call.meta["example_value"])
    assert gm.graph.find_nodes(op="call_method", target="conj")


def test_small_products_stay(trace, apply):
    records, _ = apply(trace(Net(), (X, PROMPT)), f"{FACTS},hoist-calls{{counted_writes=true}}")
    assert said(records) == [("kept", "no large product depends on what calls leave alone")]


def test_large_products_are_outlined(trace, apply):
    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.key = nn.Linear(4096, 8)

    gm = trace(Wide(), (X, torch.randn(1, 64, 4096)))
    apply(gm, f"{FACTS},hoist-calls{{counted_writes=true}}")
    assert len(invariants(gm.graph)) == 1


class Rays(nn.Module):
    """A denoising step whose latents are moved along by rays, as Matrix-Game-3.0's are."""

    def __init__(self):
        super().__init__()
        self.rays, self.qkv = nn.Linear(4, 8), nn.Linear(8, 24)

    def forward(self, x, level, rays):
        tokens = x.flatten(2).mT * level + F.silu(self.rays(rays))
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return out.mT.unflatten(-1, x.shape[2:])


LATENTS, RAYS = torch.randn(1, 8, 2, 3, 4), torch.randn(1, 24, 4)


def test_what_conditions_a_denoising_step_is_outlined(trace, apply):
    records, _ = apply(trace(Rays(), (LATENTS, torch.tensor([0.5]), RAYS)), TEXT)
    assert said(records) == [("rewritten", "2 calls run once for the same rays")]


def test_what_conditions_a_call_without_a_level_stays(trace, apply):
    level = torch.rand(1, 24, 8)  # as many numbers as the tokens have
    records, _ = apply(trace(Rays(), (LATENTS, level, RAYS)), TEXT)
    assert not records[-1].changed


def test_what_a_session_answers_is_asked_in_every_call(trace, apply):
    """Another chunk may choose other latents of the same history."""

    def fn(x, history):
        shown = torch.ops.lipass.chosen_latents(history, 4).repeat_interleave(4, 1)
        k = torch.where(shown[:, None, :, None], history, 0.0) * 2
        return F.scaled_dot_product_attention(x, k, k)

    gm = trace(fn, (torch.randn(1, 2, 6, 4), torch.randn(1, 2, 8, 4)))
    apply(gm, TEXT)
    names = {str(node.target) for body in bodies(gm) for node in body.graph.nodes}
    assert not any("chosen_latents" in name for name in names)
