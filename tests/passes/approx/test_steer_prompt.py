# ruff: noqa: E501  (goldens: one line is one node)
import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from lipass.passes.graph.marks import invariants
from lipass.testing import assert_refuses, assert_rewrites, graph_diff, run_passes

FACTS = "canonicalize,find-attention,find-poses"
TEXT = f"{FACTS},steer-prompt"
LATENTS = torch.randn(1, 8, 2, 4, 4)


class Cross(nn.Module):
    """Tokens of latents that attend to a prompt, as in Wan's models."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 32), nn.Linear(4, 32), nn.Linear(4, 32)

    def forward(self, latents, prompt, **options):
        x = latents.permute(0, 2, 3, 4, 1).flatten(1, 3)
        q, k, v = (
            project(tokens).unflatten(-1, (2, 16)).transpose(1, 2)
            for project, tokens in ((self.query, x), (self.key, prompt), (self.value, prompt))
        )
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


@pytest.fixture
def cross():
    torch.manual_seed(0)
    return Cross().eval()


def test_decode(trace, apply, mini, inputs):
    records, _ = apply(trace(mini, inputs(4).decode, inputs(8).decode), TEXT)
    assert_expected_inline(
        records[-1].diff,
        """\
-%out: f32[1, 2, 64, 16] = scaled_dot_product_attention(%q, %key, %value)  # blocks.0
-%transpose: f32[1, 64, 2, 16] = %out.transpose(1, 2)  # blocks.0
+%steering_bias_default: f32[1, 1, 4, n1 + 70] = lipass.steering_bias(%q, [6, $n1, 64], 'text,history,current', 16, 4)  # blocks.0
+%attend_steered_default: f32[1, 2, 64, 16] = lipass.attend_steered(%q, %key, %value, %steering_bias_default, None)  # blocks.0
+%transpose: f32[1, 64, 2, 16] = %attend_steered_default.transpose(1, 2)  # blocks.0
-%out_1: f32[1, 2, 64, 16] = scaled_dot_product_attention(%q_1, %key_1, %value_1)  # blocks.1
-%transpose_1: f32[1, 64, 2, 16] = %out_1.transpose(1, 2)  # blocks.1
+%steering_bias_default_1: f32[1, 1, 4, n2 + 70] = lipass.steering_bias(%q_1, [6, $n2, 64], 'text,history,current', 16, 4)  # blocks.1
+%attend_steered_default_1: f32[1, 2, 64, 16] = lipass.attend_steered(%q_1, %key_1, %value_1, %steering_bias_default_1, None)  # blocks.1
+%transpose_1: f32[1, 64, 2, 16] = %attend_steered_default_1.transpose(1, 2)  # blocks.1
""",
    )


def test_one_run_of_joined_keys_may_vary():
    def attend(latents, history):
        q = latents.permute(0, 2, 3, 4, 1).flatten(1, 3)[:, None]
        keys = torch.cat([history, q], 2)
        return F.scaled_dot_product_attention(q, keys * 2, keys)

    given, grown = ((LATENTS, torch.randn(1, 1, n * 16, 8)) for n in (4, 6))
    diff = assert_rewrites(attend, given, TEXT, adds="steering_bias", grown=grown)
    assert "'history,current', 16, 2)" in diff


def test_cross_attention(cross):
    assert_expected_inline(
        graph_diff(cross, (LATENTS, torch.randn(1, 12, 4)), TEXT),
        """\
-%scaled_dot_product_attention: f32[1, 2, 32, 16] = scaled_dot_product_attention(%q, %k, %v)
-%transpose_3: f32[1, 32, 2, 16] = %scaled_dot_product_attention.transpose(1, 2)
+%steering_bias_default: f32[1, 1, 2, 12] = lipass.steering_bias(%q, [12], 'text', 1, 2)
+%attend_steered_default: f32[1, 2, 32, 16] = lipass.attend_steered(%q, %k, %v, %steering_bias_default, None)
+%transpose_3: f32[1, 32, 2, 16] = %attend_steered_default.transpose(1, 2)
""",
    )


def test_nothing_is_added_where_nobody_says_anything(cross, mini, inputs):
    assert_rewrites(cross, (LATENTS, torch.randn(1, 12, 4)), TEXT, adds="steering_bias")
    assert_rewrites(mini, inputs(4).decode, TEXT, adds="steering_bias")
    assert_rewrites(mini, inputs(4).prefill, TEXT, adds="steering_bias")


@pytest.mark.parametrize(
    "mask", [torch.arange(12) < 9, torch.randn(12)], ids=["padding", "scores"]
)
def test_a_mask_over_the_prompt_stays(cross, mask):
    def masked(latents, prompt, mask):
        return cross(latents, prompt, attn_mask=mask)

    given = (LATENTS, torch.randn(1, 12, 4), mask[None, None, None])
    assert_rewrites(masked, given, TEXT, adds="steering_bias")


def test_a_mask_of_queries_is_kept(cross):
    def masked(latents, prompt, mask):
        return cross(latents, prompt, attn_mask=mask)

    given = (LATENTS, torch.randn(1, 12, 4), torch.randn(1, 1, 32, 12))
    assert_refuses(masked, given, TEXT, "may differ between queries")


def test_equal_keys_of_a_prompt_are_told_apart_again(cross):
    prompt = torch.cat([torch.randn(1, 9, 4), torch.zeros(1, 119, 4)], 1)
    text = f"{FACTS},find-steps,collapse-keys,steer-prompt"
    gm = run_passes(cross, (LATENTS, prompt), text).gm
    assert not gm.graph.find_nodes(
        op="call_function", target=torch.ops.lipass.attend_distinct.default
    )
    assert_rewrites(cross, (LATENTS, prompt), text, adds="steering_bias")


def test_sparse_calls_get_it_as_the_bias_of_their_keys(trace, apply, mini, inputs):
    gm = trace(mini, inputs(8).decode)
    apply(gm, f"{FACTS},sparse-attention{{budget_decode=0.5 tile=1x4x4}},steer-prompt")
    calls = gm.graph.find_nodes(
        op="call_function", target=torch.ops.lipass.sparse_attention.default
    )
    assert len(calls) == 2
    assert all(
        call.kwargs["key_bias"].meta["example_value"].shape == (1, 1, 4, 198) for call in calls
    )


def test_what_is_added_is_kept_from_no_call_to_another(cross):
    """The answer changes though prompt and cameras stay: it is asked with a query."""
    text = f"{FACTS},find-steps,steer-prompt,hoist-calls{{work_min=0 counted_writes=true}}"
    graph = run_passes(cross, (LATENTS, torch.randn(1, 12, 4)), text).gm.graph
    assert graph.find_nodes(op="call_function", target=torch.ops.lipass.steering_bias.default)
    for call in invariants(graph):
        body = graph.owning_module.get_submodule(call.target).graph
        assert not body.find_nodes(
            op="call_function", target=torch.ops.lipass.steering_bias.default
        )


def test_steps_of_an_unrolled_loop_ask_each(trace, apply, mini, inputs):
    gm = trace(mini.chunk, inputs(4).chunk)
    apply(gm, f"{FACTS},find-steps,hoist-steps,steer-prompt,guard-steps")
    asks = [
        node
        for module in gm.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.target is torch.ops.lipass.steering_bias.default
    ]
    assert asks


def test_causal_attention_is_kept(cross):
    def causal(latents, prompt):
        return cross(latents, prompt, is_causal=True)

    assert_refuses(causal, (LATENTS, torch.randn(1, 12, 4)), TEXT, "causal")


def test_several_runs_of_text_are_kept():
    def attend(x, image, prompt, history):
        q = x.permute(0, 2, 3, 4, 1).flatten(1, 3)[:, None]
        keys = torch.cat([image, prompt, history, q], 2)
        return F.scaled_dot_product_attention(q, keys, keys)

    given = (LATENTS, torch.randn(1, 1, 5, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 64, 8))
    segments = "find-attention{segments=text+text+history+current}"
    assert_refuses(attend, given, f"canonicalize,{segments},steer-prompt", "pieces")


def test_a_merged_history_is_kept(trace, apply, mini, inputs):
    gm = trace(mini, inputs(8).decode)
    _, ctx = apply(gm, f"{FACTS},merge-history,steer-prompt")
    notes = [n for n in ctx.notes if n.pass_name == "steer-prompt"]
    assert {n.action for n in notes} == {"kept"}
    assert "adds nothing to scores" in notes[0].reason


def test_attention_without_prompt_and_history_is_kept():
    def attend(x):
        q = x.permute(0, 2, 3, 4, 1).flatten(1, 3)[:, None]
        return F.scaled_dot_product_attention(q, q, q)

    assert_refuses(attend, (LATENTS,), TEXT, "self without a prompt or a history")
