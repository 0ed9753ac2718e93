import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from lipass.passes.attention.site import sites
from lipass.passes.graph.marks import region_name

TEXT = "canonicalize,find-attention,find-steps,guard-steps"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x, sigma):
        return torch.tanh(self.lin(x)) * sigma


X, S = torch.randn(2, 4), torch.rand(4)


def euler(net, steps=2):
    def fn(x, s):
        for i in range(steps):
            x = x + (s[i + 1] - s[i]) * net(x, s[i])
        return x

    return fn


def test_unrolled_loop(trace, apply):
    gm = trace(euler(Net()), (X, S))
    records, _ = apply(gm, TEXT)
    assert_expected_inline(
        records[-1].diff,
        """\
-%linear: f32[2, 4] = linear($x, $net.lin.weight, $net.lin.bias)  # lin
-%tanh: f32[2, 4] = tanh(%linear)
-%mul: f32[2, 4] = mul(%tanh, %getitem_2)
-%mul_1: f32[2, 4] = mul(%sub, %mul)
+%denoise_step = denoise_step($x, %getitem_2; 2 parameters)
+%getitem_6: f32[2, 4] = getitem(%denoise_step, 0)
+%mul_1: f32[2, 4] = mul(%sub, %getitem_6)
-%linear_1: f32[2, 4] = linear(%x, $net.lin.weight, $net.lin.bias)  # lin@1
-%tanh_1: f32[2, 4] = tanh(%linear_1)  # @1
-%mul_2: f32[2, 4] = mul(%tanh_1, %getitem_5)  # @1
-%mul_3: f32[2, 4] = mul(%sub_1, %mul_2)
+%denoise_step_1 = denoise_step(%x, %getitem_5; 2 parameters)
+%getitem_7: f32[2, 4] = getitem(%denoise_step_1, 0)
+%mul_3: f32[2, 4] = mul(%sub_1, %getitem_7)
""",
    )


def test_body_of_an_unrolled_loop(trace, apply):
    from lipass.passes.printer import print_graph

    gm = trace(euler(Net()), (X, S))
    apply(gm, TEXT)
    assert_expected_inline(
        print_graph(gm.denoise_step.graph),
        """\
$x: f32[2, 4] = input
$getitem_2: f32[] = input
%linear: f32[2, 4] = linear($x, $net.lin.weight, $net.lin.bias)  # lin
%tanh: f32[2, 4] = tanh(%linear)
%mul: f32[2, 4] = mul(%tanh, $getitem_2)
return (%mul)
""",
    )


def test_outlined_loop_computes_the_same(trace, apply):
    net = Net()
    fn = euler(net, 3)
    gm = trace(fn, (X, S))
    compiled = torch.compile(fn, backend=lambda _, __: gm.forward)
    apply(gm, TEXT)
    with torch.no_grad():
        assert torch.equal(compiled(X, S), fn(X, S))


def test_chunk_with_a_history_that_varies(trace, apply, mini, inputs):
    gm = trace(mini.chunk, inputs(4).chunk, inputs(8).chunk)
    records, _ = apply(gm, TEXT)
    assert records[-1].notes[0].reason == "3 steps call one module behind a guard"
    calls = gm.graph.find_nodes(op="call_module")
    assert [region_name(call) for call in calls] == ["step 0", "step 1", "step 2"]
    assert {call.target for call in calls} == {"denoise_step"}


def test_sites_of_the_body_are_named_once(trace, apply, mini, inputs):
    gm = trace(mini.chunk, inputs(4).chunk)
    apply(gm, "canonicalize,find-attention,find-steps,sparse-attention,guard-steps")
    names = [site.name for _, site in sites(gm.denoise_step.graph)]
    assert names == ["blocks.0:decode", "blocks.1:decode"]
    calls = gm.denoise_step.graph.find_nodes(
        op="call_function", target=torch.ops.lipass.sparse_attention.default
    )
    assert [call.args[12] for call in calls] == names


def test_inputs_with_other_strides_become_contiguous(trace, apply):
    class Turned(Net):
        def forward(self, x, sigma):
            return super().forward(x, sigma).mT.contiguous().mT

    gm = trace(euler(Turned()), (X, S))
    records, _ = apply(gm, TEXT)
    assert records[-1].changed


def test_whole_call_of_a_loop_in_python(trace, apply, mini, inputs):
    gm = trace(mini, inputs(4).decode)
    records, _ = apply(gm, TEXT)
    assert not records[-1].changed
    assert region_name(gm.graph.output_node()) == "call"


def test_prefill_is_no_step(notes, mini, inputs):
    reason = "it has no decode or self site, so it is no denoising step"
    assert notes(mini, inputs(4).prefill, TEXT) == [("call", "kept", reason)]


class Writes(Net):
    def forward(self, x, sigma):
        x.add_(0.1)
        return super().forward(x, sigma)


class Drops(Net):
    def forward(self, x, sigma):
        return F.dropout(super().forward(x, sigma), 0.5, training=True)


class Noise(Net):
    def forward(self, x, sigma):
        return super().forward(x, sigma) + torch.randn_like(x)


class Hands(Net):
    def forward(self, x, sigma):
        return x[:, :2], super().forward(x, sigma)


def tuple_euler(net):
    def fn(x, s):
        for i in range(2):
            part, v = net(x, s[i])
            x = x + (s[i + 1] - s[i]) * v + part.sum()
        return x

    return fn


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (euler(Writes()), "writes to the input x"),
        (euler(Drops()), "draws random numbers"),
        (euler(Noise()), "draws random numbers"),
        (tuple_euler(Hands()), "shares memory with %l_x_"),
    ],
    ids=["write", "dropout", "noise", "alias"],
)
def test_impure_steps_stay(notes, fn, reason):
    ((site, action, why),) = notes(fn, (X, S), TEXT)
    assert (site, action) == ("steps", "kept")
    assert why.startswith("step 0 is not pure: %")
    assert why.endswith(reason)


def test_writes_to_memory_of_its_own_are_pure(trace, apply):
    class Local(Net):
        def forward(self, x, sigma):
            y = torch.zeros_like(x)
            y[:, 0] = 1.0
            return super().forward(x, sigma) + y

    gm = trace(euler(Local()), (X, S))
    records, _ = apply(gm, TEXT)
    assert records[-1].changed


def test_dropout_that_is_off_is_pure(trace, apply):
    class Off(Net):
        def forward(self, x, sigma):
            return F.dropout(super().forward(x, sigma), 0.5, training=False)

    records, _ = apply(trace(euler(Off()), (X, S)), TEXT)
    assert records[-1].changed


def test_impure_call_of_a_loop_in_python_stays(notes, mini, inputs):
    def fn(latents, *args):
        latents.mul_(0.5)
        return mini(latents, *args)

    ((site, action, why),) = notes(fn, inputs(4).decode, TEXT)
    assert (site, action) == ("call", "kept")
    assert why.endswith("writes to the input latents")


def test_several_outputs(trace, apply):
    class Pair(Net):
        def forward(self, x, sigma):
            v = super().forward(x, sigma)
            return v.sum(), v

    fn = tuple_euler(Pair())
    gm = trace(fn, (X, S))
    compiled = torch.compile(fn, backend=lambda _, __: gm.forward)
    records, _ = apply(gm, TEXT)
    assert records[-1].changed
    with torch.no_grad():
        assert torch.equal(compiled(X, S), fn(X, S))


def test_sizes_read_from_inputs_belong_to_their_step(trace, apply):
    class Decode(nn.Module):
        def forward(self, x, sigma, text, history):
            q = (x * sigma).flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)
            key = torch.cat([text, history, q], 2)
            out = F.scaled_dot_product_attention(q, key, key)
            return out.transpose(1, 2).flatten(2).mT.unflatten(-1, (4, 4, 4)).contiguous()

    model = Decode()

    def fn(x, sigmas, *cache):
        for i in range(2):
            x = x + 0.1 * model(x, sigmas[i], *cache)
        return x

    x, text = torch.randn(1, 16, 4, 4, 4), torch.randn(1, 2, 6, 8)
    args = [(x, torch.ones(2), text, torch.randn(1, 2, n, 8)) for n in (64, 128)]
    gm = trace(fn, *args)
    records, _ = apply(gm, "canonicalize,find-attention,find-steps,sparse-attention,guard-steps")
    assert records[-1].changed
    assert gm.denoise_step.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)


class Twice(nn.Module):
    """Two calls of attention in one module, over keys in pieces."""

    def forward(self, x, sigma, past):
        for scale in (1.0, 2.0):
            key = torch.cat([past, x], 2)
            x = x + F.scaled_dot_product_attention(x * scale * sigma, key, key)
        return x


@pytest.mark.parametrize("rewritten", [True, False])
def test_steps_of_a_module_with_two_sites_are_outlined(trace, apply, monkeypatch, rewritten):
    why = None if rewritten else "joined is faster"
    monkeypatch.setattr("lipass.kernels.pieces.why_joined", lambda *sizes: why)
    net = Twice()

    def fn(x, s, past):
        for i in range(3):
            x = x + (s[i + 1] - s[i]) * net(x, s[i], past)
        return x

    inputs = torch.randn(1, 2, 8, 8), S, torch.randn(1, 2, 5, 8)
    gm = trace(fn, inputs)
    _, ctx = apply(gm, TEXT.replace(",guard", ",attend-pieces,guard"))
    steps = [(n.action, n.reason) for n in ctx.notes if n.pass_name == "guard-steps"]
    assert ("rewritten", "3 steps call one module behind a guard") in steps
    named = dict(zip(("L_x_", "L_s_", "L_past_"), inputs, strict=True))
    taken = [named[node.target] for node in gm.graph.find_nodes(op="placeholder")]
    torch.testing.assert_close(gm(*taken)[0], fn(*inputs))
    if rewritten:
        names = [site.name for _, site in sites(gm.denoise_step.graph)]
        assert [name.partition(":")[0] for name in names] == ["attention#1", "attention#2"]
