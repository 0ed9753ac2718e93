import pytest
import torch
from spellings import flash_attn_forward, flash_attn_func
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from lipass.passes.attention_ops import operator_attention
from lipass.passes.match import Refusal

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@torch.library.custom_op("flash_attn::flash_attn_qkvpacked_func", mutates_args=())
def flash_attn_qkvpacked_func(qkv: torch.Tensor) -> torch.Tensor:
    return qkv[:, :, 0].clone()


@flash_attn_qkvpacked_func.register_fake
def _(qkv):
    return torch.empty_like(qkv[:, :, 0])


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=())
def flash_attn_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q + k + v


@flash_attn_backward.register_fake
def _(q, k, v):
    return torch.empty_like(q)


@pytest.fixture
def found(trace):
    """Return what is said of each call that is said to be an attention."""

    def run(fn, *args):
        gm = trace(fn, args or [torch.randn(1, 6, 2, 8) for _ in range(3)])
        return [one for node in gm.graph.nodes if (one := operator_attention(node)) is not None]

    return run


def test_flash_attn_has_tokens_in_front_of_heads(found):
    (one,) = found(lambda q, k, v: flash_attn_func(q, k, v.mT.mT, softmax_scale=0.3))
    assert [x.node.name for x in (one.q, one.k, one.v)] == ["l_q_", "l_k_", "l_v_"]
    assert {x.axes for x in (one.q, one.k, one.v)} == {one.out} == {(0, 2, 1, 3)}
    assert (one.scale, one.how) == (0.3, "flash_attn_func")


def test_default_scale_is_of_the_features(found):
    (one,) = found(flash_attn_func)
    assert one.scale == 8**-0.5


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dropout_p": 0.1}, "dropout_p of flash_attn_func is 0.1"),
        ({"causal": True}, "causal of flash_attn_func is True"),
        ({"window_size_right": 0}, "window_size_right of flash_attn_func is 0"),
        ({"softcap": 30.0}, "softcap of flash_attn_func is 30.0"),
    ],
)
def test_flash_attn_that_is_more_than_plain_attention(found, options, why):
    assert found(lambda q, k, v: flash_attn_func(q, k, v, **options)) == [Refusal(why)]


def test_flash_attn_with_slopes_that_are_data(found):
    why = "alibi_slopes of flash_attn_func is %mean"
    assert found(
        lambda q, k, v: flash_attn_func(q, k, v, alibi_slopes=q.mean((0, 1, 3)))
    ) == [Refusal(why)]


def test_flash_attn_without_a_batch(found):
    why = "q, k, v of flash_attn_func must be [B, L, H, D], got ranks [3, 3, 3]"
    assert found(lambda q, k, v: flash_attn_func(q[0], k[0], v[0])) == [Refusal(why)]


def test_flash_attn_of_one_tensor(found):
    why = "flash_attn_qkvpacked_func takes no separate q, k, v"
    fn = lambda q, k, v: flash_attn_qkvpacked_func(torch.stack([q, k, v], 2))  # noqa: E731
    assert found(fn) == [Refusal(why)]


def test_output_that_is_taken_twice(trace):
    def fn(q, k, v):
        return flash_attn_forward(q, k, v, 0.0, 0.3)[0] * 2

    graph = trace(fn, [torch.randn(1, 6, 2, 8) for _ in range(3)]).graph
    (taken,) = graph.find_nodes(op="call_function", target=__import__("operator").getitem)
    assert operator_attention(taken.args[0]).root is taken
    with graph.inserting_after(taken):
        graph.call_method("neg", (graph.node_copy(taken),))
    assert operator_attention(taken.args[0]) == Refusal("its output is taken 2 times, not once")


@pytest.mark.parametrize(
    "fn",
    [F.scaled_dot_product_attention, flash_attn_backward, lambda q, k, v: q + k + v],
    ids=["sdpa", "backward", "sum"],
)
def test_what_is_no_attention_of_another_library(found, fn):
    assert found(fn) == []


def test_flex_attention_with_a_score_function_that_does_nothing(found):
    (one,) = found(lambda q, k, v: flex_attention(q, k, v, lambda score, *_: score, scale=0.3))
    assert [x.node.name for x in (one.q, one.k, one.v)] == ["l_q_", "l_k_", "l_v_"]
    assert (one.out, one.scale, one.how) == ((0, 1, 2, 3), 0.3, "flex_attention")


def with_lse(q, k, v):
    out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
    return out * aux.lse[..., None]


def over_all_blocks(q, k, v):
    mask = create_block_mask(lambda b, h, i, j: i >= 0, None, None, 2, 2, device="cpu")
    return flex_attention(q, k, v, block_mask=mask)


def scaled_by_data(q, k, v):
    return flex_attention(q, k, v, lambda score, *_: score * q.mean())


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (with_lse, "%getitem_1 reads another result than its output"),
        (over_all_blocks, "mask_mod %mask_fn_0 masks its scores"),
        (scaled_by_data, "score_mod %score_mod_0 changes its scores"),
        (
            lambda q, k, v: flex_attention(q, k, v, lambda score, b, *_: score.new_zeros(())),
            "score_mod %score_mod_0 changes its scores",
        ),
    ],
    ids=["log-sum-exp", "mask function", "scale that is data", "scores of zero"],
)
def test_flex_attention_that_is_more_than_plain_attention(found, fn, why):
    assert found(fn) == [Refusal(why)]
