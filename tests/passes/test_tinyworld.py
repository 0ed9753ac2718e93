# ruff: noqa: E501  (goldens: one line is one node)
"""Show what the whole pipeline makes of a real model, in both forms of the denoising loop."""

import pytest
import torch
from expecttest import assert_expected_inline

from lipass.examples.tinyworld.model import ModelConfig, TinyWorld
from lipass.examples.tinyworld.rollout import SIGMAS, generate_chunk
from lipass.passes import FACTS
from lipass.passes.printer import print_graph
from lipass.passes.runner import diff_text

REWRITES = f"{FACTS},prune-context,sparse-attention,guard-steps"
OPTIONS = {
    "prune-context.window_latents": 2,
    "prune-context.prefill_each_chunk": True,
    "sparse-attention.budget_prefill": 0.5,
    "sparse-attention.budget_decode": 0.25,
    "sparse-attention.sink_latents": 1,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = TinyWorld(ModelConfig(blocks=2)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def chunk(model, n):
    w2c = torch.eye(4).repeat(1, n + 4, 1, 1)
    w2c[0, :, 0, 3] = torch.linspace(0, 3, n + 4)
    with torch.no_grad():
        text = model.text(torch.zeros(1, 32, dtype=torch.long))
    return torch.randn(1, 16, n, 8, 8), torch.randn(1, 16, 4, 8, 8), w2c, text


def prefill(model, n):
    context, _, w2c, text = chunk(model, n)
    return context, torch.zeros(1, n), w2c, text


def decode(model, n):
    _, noise, w2c, text = chunk(model, n)
    history = [tuple(torch.randn(1, 3, n * 64, 64) for _ in "kv") for _ in model.blocks]
    return noise, torch.full((1, 4), 0.9), w2c, text, history


def unrolled(model, n):
    context, noise, w2c, text = chunk(model, n)
    return model, noise, torch.tensor(SIGMAS[-3:]), context, w2c, text


def rewritten(gm, apply):
    """Return the new lines of a graph and the number of lines that went."""
    apply(gm, FACTS)
    before = print_graph(gm.graph)
    apply(gm, REWRITES, **OPTIONS)
    lines = diff_text(before, print_graph(gm.graph)).splitlines()
    gone = sum(line.startswith("-") for line in lines)
    return "".join(f"{x}\n" for x in lines if x.startswith("+")) + f"{gone} lines went\n"


def test_prefill(model, trace, apply):
    gm = trace(model, prefill(model, 4), prefill(model, 8))
    assert_expected_inline(
        rewritten(gm, apply),
        """\
+%getitem_127: f32[1, n0, 4, 4] = getitem($w2c, (:, :$n0))
+%getitem_128: f32[1, 4, 4, 4] = getitem($w2c, (:, $n0:))
+%view_overlap_default: f32[1, n0] = lipass.view_overlap(%getitem_128, %getitem_127, 60.0, 35.0, 0.5, 8.0)
+%arange_2: i64[n0] = arange($n0, device=device(type='cpu'))
+%sub_7: n0 - 2 = sub($n0, 2)
+%ge: b8[n0] = ge(%arange_2, %sub_7)
+%lt: b8[n0] = lt(%arange_2, 1)
+%ge_1: b8[1, n0] = ge(%view_overlap_default, 0.3)
+%or_: b8[n0] = or_(%ge, %lt)
+%or__1: b8[1, n0] = or_(%ge_1, %or_)
+%sparse_attention_default: f32[1, 3, 64*n0, 64] = lipass.sparse_attention(%q_3, [$text_0_0, %k_3], [$text_0_1, %v_4], [$n0, 8, 8], [1, 1, 32, $n0, 8, 8], 'text,current', [4, 4, 4], 0.5, 0.125, 1, 'prefill', %or__1, 'blocks.0:prefill')  # blocks.0
+%out_1: f32[1, 3, n0, 64, 64] = %sparse_attention_default.unflatten(2, ($n0, 64))  # blocks.0
4 lines went
""",
    )


def test_decode(model, trace, apply):
    gm = trace(model, decode(model, 4), decode(model, 8))
    assert_expected_inline(
        rewritten(gm, apply),
        """\
+%sub_8: n0 - 4 = sub($n0, 4)
+%getitem_62: f32[1, n0 - 4, 4, 4] = getitem($w2c, (:, :%sub_8))
+%getitem_63: f32[1, 4, 4, 4] = getitem($w2c, (:, %sub_8:))
+%view_overlap_default: f32[1, n0 - 4] = lipass.view_overlap(%getitem_63, %getitem_62, 60.0, 35.0, 0.5, 8.0)
+%arange_2: i64[n0 - 4] = arange(%sub_8, device=device(type='cpu'))
+%sub_9: n0 - 6 = sub(%sub_8, 2)
+%ge: b8[n0 - 4] = ge(%arange_2, %sub_9)
+%lt: b8[n0 - 4] = lt(%arange_2, 1)
+%ge_1: b8[1, n0 - 4] = ge(%view_overlap_default, 0.3)
+%or_: b8[n0 - 4] = or_(%ge, %lt)
+%or__1: b8[1, n0 - 4] = or_(%ge_1, %or_)
+%sym_size_int: n1 = aten.sym_size($history_0_0, 2)  # blocks.0
+%floordiv: (n1//64) = floordiv(%sym_size_int, 64)  # blocks.0
+%sparse_attention_default: f32[1, 3, 256, 64] = lipass.sparse_attention(%q_3, [$text_0_0, $history_0_0, %k_3], [$text_0_1, $history_0_1, %v_4], [4, 8, 8], [1, 1, 32, %floordiv, 8, 8, 4, 8, 8], 'text,history,current', [4, 4, 4], 0.25, 0.125, 1, 'decode', %or__1, 'blocks.0:decode')  # blocks.0
+%out_1: f32[1, 3, 4, 64, 64] = %sparse_attention_default.unflatten(2, (4, 64))  # blocks.0
+%sym_size_int_1: n2 = aten.sym_size($history_1_0, 2)  # blocks.1
+%floordiv_1: (n2//64) = floordiv(%sym_size_int_1, 64)  # blocks.1
+%sparse_attention_default_1: f32[1, 3, 256, 64] = lipass.sparse_attention(%q_7, [$text_1_0, $history_1_0, %k_7], [$text_1_1, $history_1_1, %v_7], [4, 8, 8], [1, 1, 32, %floordiv_1, 8, 8, 4, 8, 8], 'text,history,current', [4, 4, 4], 0.25, 0.125, 1, 'decode', %or__1, 'blocks.1:decode')  # blocks.1
+%out_5: f32[1, 3, 4, 64, 64] = %sparse_attention_default_1.unflatten(2, (4, 64))  # blocks.1
8 lines went
""",
    )


def test_unrolled_chunk(model, trace, apply):
    gm = trace(generate_chunk, unrolled(model, 4), unrolled(model, 8))
    assert_expected_inline(
        rewritten(gm, apply),
        """\
+%getitem_262: f32[1, n0, 4, 4] = getitem($w2c, (:, :$n0))
+%getitem_263: f32[1, 4, 4, 4] = getitem($w2c, (:, $n0:))
+%view_overlap_default: f32[1, n0] = lipass.view_overlap(%getitem_263, %getitem_262, 60.0, 35.0, 0.5, 8.0)
+%arange_6: i64[n0] = arange($n0, device=device(type='cpu'))
+%sub_25: n0 - 2 = sub($n0, 2)
+%ge: b8[n0] = ge(%arange_6, %sub_25)
+%lt: b8[n0] = lt(%arange_6, 1)
+%ge_1: b8[1, n0] = ge(%view_overlap_default, 0.3)
+%or_: b8[n0] = or_(%ge, %lt)
+%or__1: b8[1, n0] = or_(%ge_1, %or_)
+%sparse_attention_default: f32[1, 3, 64*n0, 64] = lipass.sparse_attention(%q_3, [$text_0_0, %k_3], [$text_0_1, %v_4], [$n0, 8, 8], [1, 1, 32, $n0, 8, 8], 'text,current', [4, 4, 4], 0.5, 0.125, 1, 'prefill', %or__1, 'blocks.0:prefill')  # blocks.0
+%out_1: f32[1, 3, n0, 64, 64] = %sparse_attention_default.unflatten(2, ($n0, 64))  # blocks.0
+%denoise_step = denoise_step($w2c, $n0, $noise, %expand, $frequencies, $rotary.cos, $rotary.sin, $text_0_0, %k_3, $text_0_1, %v_4, %or__1, $text_1_0, %k_7, $text_1_1, %v_7; 32 parameters)
+%getitem_264: f32[1, 16, 4, 8, 8] = getitem(%denoise_step, 0)
+%mul_56: f32[1, 16, 4, 8, 8] = mul(%sub_15, %getitem_264)
+%denoise_step_1 = denoise_step($w2c, $n0, %x_6, %expand_1, $frequencies, $rotary.cos, $rotary.sin, $text_0_0, %k_3, $text_0_1, %v_4, %or__1, $text_1_0, %k_7, $text_1_1, %v_7; 32 parameters)
+%getitem_265: f32[1, 16, 4, 8, 8] = getitem(%denoise_step_1, 0)
+%mul_85: f32[1, 16, 4, 8, 8] = mul(%sub_24, %getitem_265)
498 lines went
""",
    )


def test_body_of_the_unrolled_loop_is_the_decode_graph(model, trace, apply):
    """One step of the unrolled loop is, call for call, what the loop in Python compiles."""
    graphs = trace(generate_chunk, unrolled(model, 4)), trace(model, decode(model, 4))
    for gm in graphs:
        apply(gm, f"{FACTS},sparse-attention,guard-steps")
    body, call = (
        [str(n.target) for n in g.nodes if n.op.startswith("call")]
        for g in (graphs[0].denoise_step.graph, graphs[1].graph)
    )
    assert body == call


@pytest.mark.parametrize(("form", "inner"), [("python", "aot_eager"), ("unrolled", "eager")])
def test_budget_one_equals_the_model(model, form, inner):
    """Every token visited, every frame kept, every step computed: the passes change nothing."""
    options = {
        "preset": "all",
        "inner": inner,
        "sparse.budget": 1.0,
        "context.overlap_min": 0.0,
        "strict": True,
    }
    torch._dynamo.reset()
    args = unrolled(model, 4)
    with torch.no_grad():
        expected = generate_chunk(*args)
        if form == "python":
            step = torch.compile(model, backend="light_interaction", options=options)
            actual = generate_chunk(step, *args[1:])
        else:
            whole = torch.compile(generate_chunk, backend="light_interaction", options=options)
            actual = whole(*args)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
