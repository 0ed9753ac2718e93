import operator

import pytest
import torch
from spellings import flash_attn_forward, flash_attn_func
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from lipass.passes.attention.attention_ops import operator_attention
from lipass.passes.attention.match import Refusal
from lipass.passes.attention.softmax_attention import Spelled

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
INPUTS = tuple(torch.randn(1, 6, 2, 8) for _ in range(3))


@torch.library.custom_op("flash_attn::flash_attn_qkvpacked_func", mutates_args=())
def packed(qkv: torch.Tensor) -> torch.Tensor:
    return qkv[0].clone()


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=())
def backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q + k + v


@torch.library.custom_op("flash_attn_3::fwd", mutates_args=())
def third(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float = 0.3,
    seqused_k: torch.Tensor | None = None,
    num_splits: int = 1,
    rotary_interleaved: bool = False,
) -> torch.Tensor:
    return flash_attn_func(q, k, v, softmax_scale=softmax_scale)


third.register_fake(lambda q, *_, **__: torch.empty_like(q))
packed.register_fake(lambda qkv: torch.empty_like(qkv[0]))
backward.register_fake(lambda q, k, v: torch.empty_like(q))


@pytest.fixture
def found(trace):
    """Return what is said of each call that is an attention, or looks like one."""

    def run(fn):
        said = [operator_attention(node) for node in trace(fn, INPUTS).graph.nodes]
        return [one for one in said if one is not None]

    return run


def test_flash_attn_has_tokens_in_front_of_heads(found):
    (one,) = found(flash_attn_func)
    assert [x.node.name for x in (one.q, one.k, one.v)] == ["l_args_0_", "l_args_1_", "l_args_2_"]
    assert {x.axes for x in (one.q, one.k, one.v)} == {one.out} == {(0, 2, 1, 3)}
    assert (one.scale, one.how) == (8**-0.5, "flash_attn_func")


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda *qkv: flash_attn_func(*qkv, softcap=3.0), "softcap of flash_attn_func is 3.0"),
        (
            lambda q, k, v: flash_attn_func(q, k, v, alibi_slopes=q.mean((0, 1, 3))),
            "alibi_slopes of flash_attn_func is %mean",
        ),
        (
            lambda q, k, v: flash_attn_func(q[0], k[0], v[0]),
            "q, k, v of flash_attn_func must be [B, L, H, D], got ranks [3, 3, 3]",
        ),
        (
            lambda q, k, v: packed(torch.stack([q, k, v])),
            "flash_attn_qkvpacked_func takes no separate q, k, v",
        ),
        (
            lambda q, k, v: third(q, k, v, seqused_k=q.mean((0, 1, 3)).int()),
            "seqused_k of fwd is not known to be harmless",
        ),
        (
            lambda q, k, v: third(q, k, v, rotary_interleaved=True),
            "rotary_interleaved of fwd is not known to be harmless",
        ),
    ],
)
def test_flash_attn_that_is_more_than_plain_attention(found, fn, why):
    assert found(fn) == [Refusal(why)]


def test_arguments_at_their_defaults_and_harmless_ones_are_plain(found):
    (one,) = found(lambda *qkv: third(*qkv, 0.5, None, num_splits=4))
    assert (one.scale, one.how) == (0.5, "fwd")


def test_output_that_is_taken_twice(trace):
    graph = trace(lambda *qkv: flash_attn_forward(*qkv, 0.0, 0.3)[0] * 2, INPUTS).graph
    (taken,) = graph.find_nodes(op="call_function", target=operator.getitem)
    assert operator_attention(taken.args[0]).root is taken
    with graph.inserting_after(taken):
        graph.call_method("neg", (graph.node_copy(taken),))
    assert operator_attention(taken.args[0]) == Refusal("its output is taken 2 times, not once")


@pytest.mark.parametrize(
    "fn",
    [F.scaled_dot_product_attention, backward, lambda q, k, v: q + k + v],
    ids=["sdpa", "backward", "sum"],
)
def test_what_is_no_attention_of_another_library(found, fn):
    assert found(fn) == []


def test_flex_attention_whose_score_function_does_nothing(found):
    (one,) = found(lambda q, k, v: flex_attention(q, k, v, lambda score, *_: score, scale=0.3))
    assert [x.node.name for x in (one.q, one.k, one.v)] == ["l_q_", "l_k_", "l_v_"]
    assert (one.out, one.scale, one.how) == ((0, 1, 2, 3), 0.3, "flex_attention")


def test_mask_function_that_turns_its_answer_around(trace):
    def nothing(b, h, i, j):
        passes = torch.ones((), dtype=torch.bool)
        passes.logical_not_()
        return passes

    def fn(q, k, v):
        one = torch.ones([1, 1, 1], dtype=torch.int32)
        mask = BlockMask.from_kv_blocks(one, one[..., None] * 0, BLOCK_SIZE=64, mask_mod=nothing)
        return flex_attention(q, k, v, block_mask=mask)

    inputs = tuple(torch.randn(1, 2, 64, 8) for _ in range(3))
    said = [operator_attention(node) for node in trace(fn, inputs).graph.nodes]
    assert not any(isinstance(one, Spelled) for one in said)


def with_lse(q, k, v):
    out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
    return out * aux.lse[..., None]


def test_flex_attention_whose_log_sum_exp_is_read(found):
    assert found(with_lse) == [Refusal("%lse reads another result than its output")]


@pytest.mark.parametrize(
    "score",
    [lambda score, b, *_: score * b, lambda score, *_: score.new_zeros(())],
    ids=["times the batch", "zeros"],
)
def test_flex_attention_of_other_scores(found, score):
    why = "score_mod %score_mod_0 changes its scores"
    assert found(lambda q, k, v: flex_attention(q, k, v, score)) == [Refusal(why)]
