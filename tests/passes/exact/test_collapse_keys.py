import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from lipass.passes.graph.marks import invariants
from lipass.testing import assert_refuses, assert_rewrites, graph_diff, run_passes

TEXT = "canonicalize,find-attention,collapse-keys"


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


LATENTS = torch.randn(1, 8, 2, 4, 4)


def prompt(tokens, length=128):
    return torch.cat([torch.randn(1, tokens, 4), torch.zeros(1, length - tokens, 4)], 1)


@pytest.fixture
def cross():
    torch.manual_seed(0)
    return Cross().eval()


def test_cross_attention(cross):
    assert_expected_inline(
        graph_diff(cross, (LATENTS, prompt(9)), TEXT),
        """\
-%scaled_dot_product_attention: f32[1, 2, 32, 16] = scaled_dot_product_attention(%q, %k, %v)
-%transpose_3: f32[1, 32, 2, 16] = %scaled_dot_product_attention.transpose(1, 2)
+%distinct_keys_default: i64[] = lipass.distinct_keys(%k, %v)
+%attend_distinct_default: f32[1, 2, 32, 16] = lipass.attend_distinct(%q, %k, %v, %distinct_keys_default, 0.25, 'attention')
+%transpose_3: f32[1, 32, 2, 16] = %attend_distinct_default.transpose(1, 2)
""",  # noqa: E501
    )


@pytest.mark.parametrize("tokens", [0, 9, 127, 128])
def test_output_is_that_of_all_keys(cross, tokens):
    assert_rewrites(cross, (LATENTS, prompt(tokens)), TEXT, adds="attend_distinct")


def test_distinct_keys_are_counted_once_a_prompt(cross):
    text = f"{TEXT},find-poses,find-steps,hoist-calls{{work_min=0 counted_writes=true}}"
    graph = run_passes(cross, (LATENTS, prompt(9)), text).gm.graph
    (call,) = invariants(graph)
    body = graph.owning_module.get_submodule(call.target).graph
    assert body.find_nodes(op="call_function", target=torch.ops.lipass.distinct_keys.default)


def test_short_prompt_stays(cross):
    assert_refuses(cross, (LATENTS, prompt(9, 32)), TEXT, "32 keys, padded prompts have 64")


def test_prompt_in_fp64_stays():
    args = LATENTS.double(), prompt(9).double()
    assert_refuses(Cross().double().eval(), args, TEXT, "weighed in fp32, got torch.float64")


def test_prompt_of_any_length_stays(cross):
    grown = LATENTS, prompt(9, 200)
    assert_refuses(cross, (LATENTS, prompt(9)), TEXT, "padded prompts", grown=grown)


def test_masked_prompt_stays(cross):
    def fn(latents, text):
        return cross(latents, text, attn_mask=torch.ones(32, 128, dtype=torch.bool).tril())

    assert_refuses(fn, (LATENTS, prompt(9)), TEXT)


def test_keys_of_the_tokens_themselves_stay():
    def fn(latents):
        q = latents.permute(0, 2, 3, 4, 1).flatten(1, 3)[:, None].sin()
        return F.scaled_dot_product_attention(q, q, q)

    assert_refuses(fn, (torch.randn(1, 8, 4, 4, 4),), TEXT)
