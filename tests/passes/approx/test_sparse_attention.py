# ruff: noqa: E501  (goldens: one line is one node)
import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F

from lipass.passes.core import PassPipeline
from lipass.testing import assert_refuses

TEXT = "canonicalize,find-attention,sparse-attention"
OPTIONS = "{tile=2x4x4 budget_prefill=0.5 budget_decode=0.25 sink_latents=1}"


def test_decode(trace, apply, mini, inputs):
    records, _ = apply(trace(mini, inputs(4).decode, inputs(8).decode), TEXT + OPTIONS)
    assert_expected_inline(
        records[-1].diff,
        """\
-%key: f32[1, 2, n1 + 70, 16] = cat([$text_0_0, $history_0_0, %k], 2)  # blocks.0
-%value: f32[1, 2, n1 + 70, 16] = cat([$text_0_1, $history_0_1, %v], 2)  # blocks.0
-%out: f32[1, 2, 64, 16] = scaled_dot_product_attention(%q, %key, %value)  # blocks.0
-%transpose: f32[1, 64, 2, 16] = %out.transpose(1, 2)  # blocks.0
+%sym_size_int: n1 = aten.sym_size($history_0_0, 2)  # blocks.0
+%floordiv: (n1//16) = floordiv(%sym_size_int, 16)  # blocks.0
+%sparse_attention_default: f32[1, 2, 64, 16] = lipass.sparse_attention(%q, [$text_0_0, $history_0_0, %k], [$text_0_1, $history_0_1, %v], [4, 4, 4], [1, 1, 6, %floordiv, 4, 4, 4, 4, 4], 'text,history,current', [2, 4, 4], 0.25, 0.25, 1, 'decode', None, 'blocks.0:decode')  # blocks.0
+%transpose: f32[1, 64, 2, 16] = %sparse_attention_default.transpose(1, 2)  # blocks.0
-%key_1: f32[1, 2, n2 + 70, 16] = cat([$text_1_0, $history_1_0, %k_1], 2)  # blocks.1
-%value_1: f32[1, 2, n2 + 70, 16] = cat([$text_1_1, $history_1_1, %v_1], 2)  # blocks.1
-%out_1: f32[1, 2, 64, 16] = scaled_dot_product_attention(%q_1, %key_1, %value_1)  # blocks.1
-%transpose_1: f32[1, 64, 2, 16] = %out_1.transpose(1, 2)  # blocks.1
+%sym_size_int_1: n2 = aten.sym_size($history_1_0, 2)  # blocks.1
+%floordiv_1: (n2//16) = floordiv(%sym_size_int_1, 16)  # blocks.1
+%sparse_attention_default_1: f32[1, 2, 64, 16] = lipass.sparse_attention(%q_1, [$text_1_0, $history_1_0, %k_1], [$text_1_1, $history_1_1, %v_1], [4, 4, 4], [1, 1, 6, %floordiv_1, 4, 4, 4, 4, 4], 'text,history,current', [2, 4, 4], 0.25, 0.25, 1, 'decode', None, 'blocks.1:decode')  # blocks.1
+%transpose_1: f32[1, 64, 2, 16] = %sparse_attention_default_1.transpose(1, 2)  # blocks.1
""",
    )


def test_prefill(trace, apply, mini, inputs):
    records, _ = apply(trace(mini, inputs(4).prefill, inputs(8).prefill), TEXT + OPTIONS)
    assert_expected_inline(
        records[-1].diff,
        """\
-%key: f32[1, 2, 16*n0 + 6, 16] = cat([$text_0_0, %k], 2)  # blocks.0
-%value: f32[1, 2, 16*n0 + 6, 16] = cat([$text_0_1, %v], 2)  # blocks.0
-%out: f32[1, 2, 16*n0, 16] = scaled_dot_product_attention(%q, %key, %value)  # blocks.0
-%transpose: f32[1, 16*n0, 2, 16] = %out.transpose(1, 2)  # blocks.0
+%sparse_attention_default: f32[1, 2, 16*n0, 16] = lipass.sparse_attention(%q, [$text_0_0, %k], [$text_0_1, %v], [$n0, 4, 4], [1, 1, 6, $n0, 4, 4], 'text,current', [2, 4, 4], 0.5, 0.25, 1, 'prefill', None, 'blocks.0:prefill')  # blocks.0
+%transpose: f32[1, 16*n0, 2, 16] = %sparse_attention_default.transpose(1, 2)  # blocks.0
""",
    )


def test_fixed_sizes_are_constants(trace, apply, mini, inputs):
    gm = trace(mini, inputs(4).decode)
    apply(gm, TEXT)
    (call, _) = gm.graph.find_nodes(
        op="call_function", target=torch.ops.lipass.sparse_attention.default
    )
    assert call.args[3:5] == ([4, 4, 4], [1, 1, 6, 4, 4, 4, 4, 4, 4])


def test_dense_layers_stay(trace, apply, mini, inputs):
    _, ctx = apply(trace(mini, inputs(4).decode), TEXT + "{dense_layers=0}")
    kept = [(note.site, note.action, note.reason) for note in ctx.notes[-2:]]
    assert kept == [
        ("blocks.0:decode", "kept", "layer 0 is in dense_layers"),
        ("blocks.1:decode", "rewritten", "decode, budget 1"),
    ]


def test_first_steps_of_an_unrolled_loop_stay_dense(trace, apply, mini, inputs):
    gm = trace(mini.chunk, inputs(4).chunk)
    _, ctx = apply(gm, TEXT.replace(",sparse", ",find-steps,sparse") + "{dense_steps=1}")
    kept = [(note.site, note.reason) for note in ctx.notes if note.action == "kept"]
    why = "denoising step 0 < dense_steps 1"
    assert kept == [(f"blocks.{n}@1:decode", why) for n in (0, 1)]


def test_layers_are_counted_in_each_call_of_the_model(trace, apply, mini, inputs):
    _, ctx = apply(trace(mini.chunk, inputs(4).chunk), TEXT + "{dense_layers=1}")
    kept = [note.site for note in ctx.notes if note.action == "kept"]
    assert kept == ["blocks.1@1:decode", "blocks.1@2:decode", "blocks.1@3:decode"]


def test_layers_of_one_module_are_counted_in_each_call_too(trace, apply):
    class Twice(torch.nn.Module):
        def forward(self, x):
            for _ in range(2):
                q = x.flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)
                out = F.scaled_dot_product_attention(q, q + 1, q).transpose(1, 2).flatten(2)
                x = x + out.mT.unflatten(2, x.shape[2:])
            return x

    net = Twice()
    gm = trace(lambda x: net(net(x)), (torch.randn(1, 16, 4, 4, 4),))
    _, ctx = apply(gm, TEXT + "{dense_layers=1}")
    kept = [note.site for note in ctx.notes if "dense_layers" in note.reason]
    assert kept == ["attention#2", "attention@1#2"]


def test_concatenation_with_another_user_stays(trace, apply):
    def fn(x, history):
        q = x.flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)
        key = torch.cat([history, q], 2)
        return F.scaled_dot_product_attention(q, key, key), key.sum(), q

    args = [(torch.randn(1, 16, 4, 4, 4), torch.randn(1, 2, 16 * n, 8)) for n in (8, 12)]
    gm = trace(fn, *args)
    records, _ = apply(gm, TEXT)
    assert records[-1].changed
    assert gm.graph.find_nodes(op="call_function", target=torch.cat)


@pytest.mark.parametrize("role", ["cross", "other"])
def test_attention_over_no_latents_stays(role):
    def fn(x, text):
        q = x.flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)
        key = text if role == "cross" else q
        causal = role == "other"
        return F.scaled_dot_product_attention(q, key, key, is_causal=causal)

    args = (torch.randn(1, 16, 4, 4, 4), torch.randn(1, 2, 6, 8))
    assert_refuses(fn, args, TEXT, f"^{role}: ")


def test_attention_that_is_differentiated_stays(apply, mini, inputs):
    graphs = []

    def keep(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(mini, backend=keep)(*inputs(4).decode)
    records, ctx = apply(graphs[0], TEXT)
    assert not records[-1].changed
    reason = "its gradient is recorded; call the model under torch.no_grad()"
    assert {note.reason for note in ctx.notes if note.pass_name == "sparse-attention"} == {reason}


def test_graph_without_attention_stays():
    assert_refuses(lambda x: x + 1, (torch.randn(3),), TEXT)


def test_budget_one_equals_dense(trace, apply, mini, inputs):
    args = inputs(4).decode
    with torch.no_grad():
        expected = mini(*args)
        gm = trace(mini, args)
        compiled = torch.compile(mini, backend=lambda _, __: gm.forward, dynamic=False)
        apply(gm, TEXT)
        torch.testing.assert_close(compiled(*args), expected, atol=1e-5, rtol=1e-5)


def test_blocks_of_single_frames_lie_within_them(trace, apply):
    patch = torch.nn.Conv2d(4, 16, 2, 2)

    def fn(x):
        q = patch(x).flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q * 2, q * 3)

    gm = trace(fn, (torch.randn(3, 4, 16, 16),))
    apply(gm, TEXT + "{tile=4x8x4 sink_latents=1}")
    (call,) = gm.graph.find_nodes(
        op="call_function", target=torch.ops.lipass.sparse_attention.default
    )
    assert call.args[3] == [1, 8, 8]
    assert call.args[6] == [1, 16, 8]
    assert call.args[9] == 0


def test_blocks_are_ranked_as_the_option_says(trace, apply, mini, inputs):
    gm = trace(mini, inputs(4).decode)
    apply(gm, f"{TEXT}{{ranking=cosine}}")
    calls = gm.graph.find_nodes(
        op="call_function", target=torch.ops.lipass.sparse_attention.default
    )
    assert [call.kwargs["planner"] for call in calls] == ["cosine", "cosine"]


def test_an_unknown_ranking_is_refused():
    with pytest.raises(ValueError, match="ranking must be one of product, cosine, got 'dot'"):
        PassPipeline.parse(f"{TEXT}{{ranking=dot}}")
