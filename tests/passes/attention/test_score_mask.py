"""Masks and biases of attention written by hand become those of SDPA, rows without a key too."""

import math

import pytest
import torch
from attending import describe, heads, kv, latents
from torch.nn import functional as F

import lipass
from lipass.kernels import registry
from lipass.passes.attention.site import SDPA
from lipass.passes.attention.sparse_call import SparseCall

INF, LOW = float("-inf"), torch.finfo(torch.float32).min
PLACES = 16
PAIRS = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
PAIRS[1], PAIRS[2] = False, True  # one query that sees nothing, one that sees all


def filled(s, m):
    return s.masked_fill(m == 0, INF)


def filled_with_a_low_number(s, m):
    return s.masked_fill(~m, -1e9)


def filled_with_the_lowest(s, m):
    return torch.masked_fill(s, m.logical_not(), torch.finfo(s.dtype).min)


def filled_before_it_is_scaled(s, m):
    return s.masked_fill(~m, -1e9) / 8


def numbers_as_mask(s, m):
    return s.masked_fill(m.int() == 0, -1e4)


def chosen(s, m):
    return torch.where(m, s, INF)


def chosen_from_a_tensor(s, m):
    return torch.where(m, s, torch.full([], LOW))


def chosen_from_full_scores(s, m):
    return torch.where(~m, torch.full_like(s, INF), s)


def chosen_by_a_method(s, m):
    return s.where(m, torch.tensor(-1e9))


def filled_twice(s, m):
    return s.masked_fill(~m, INF).masked_fill(~m.roll(1, -1), INF)


def added(s, m):
    return s + torch.zeros(m.shape).masked_fill(~m, INF)


def added_low_numbers(s, m):
    return (1.0 - m.float()) * -1e4 + s


def taken_away(s, m):
    return s - (~m).float() * 1e9


def added_before_it_is_scaled(s, m):
    return (s + torch.where(m, 0.5, -3.0)) * 0.5


def added_twice(s, m):
    return s + m.float() + torch.arange(m.shape[-1]) / 7


CENSUS = [
    filled, filled_with_a_low_number, filled_with_the_lowest, filled_before_it_is_scaled,
    numbers_as_mask, chosen, chosen_from_a_tensor, chosen_from_full_scores, chosen_by_a_method,
    filled_twice, added, added_low_numbers, taken_away, added_before_it_is_scaled, added_twice,
]  # fmt: skip
SHAPES = {
    "queries by keys": PAIRS,
    "four axes": PAIRS[None, None],
    "of each batch": torch.stack([PAIRS, ~PAIRS])[:, None],
    "of each head": torch.stack([PAIRS, ~PAIRS, PAIRS.flip(0)]),
    "padded keys": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0] * 7]).bool()[:, None, None],
    "keys": PAIRS[0],
    "queries": PAIRS[:, :1],
}


def by_hand(mask):
    def fn(q, k, v, m):
        return mask(q @ k.mT * 0.4, m).softmax(-1) @ v

    return fn


def inputs(m, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)
    return (*(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes), m)


@pytest.fixture
def becomes(trace, apply):
    """Return how many SDPA calls a function has become, once it gives the same values."""

    def run(fn, args, tolerance=1e-5):
        gm = trace(fn, args)
        _, ctx = apply(gm, "canonicalize")
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        expected = fn(*tensors)
        # what Dynamo calls first is what the function reads first
        places = {f"l_{name}_": one for name, one in zip("qkvm", tensors, strict=False)}
        given = [places[n.name] for n in gm.graph.find_nodes(op="placeholder")]
        (actual,) = gm(*given)
        torch.testing.assert_close(
            actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True
        )
        calls = gm.graph.find_nodes(op="call_function", target=SDPA)
        return len(calls), [note.reason for note in ctx.notes]

    return run


@pytest.mark.parametrize("mask", CENSUS, ids=lambda one: one.__name__)
def test_each_spelling_is_the_mask_of_sdpa(becomes, mask):
    assert becomes(by_hand(mask), inputs(PAIRS))[0] == 1


@pytest.mark.parametrize("mask", [filled, filled_with_a_low_number, added])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_broadcast(becomes, mask, shape):
    assert becomes(by_hand(mask), inputs(SHAPES[shape]))[0] == 1


def test_queries_that_see_no_key_stay_what_they_were():
    given = inputs(PAIRS)
    assert by_hand(filled)(*given)[:, :, 1].isnan().all()
    mean = given[2].mean(-2)
    torch.testing.assert_close(by_hand(filled_with_a_low_number)(*given)[:, :, 1], mean)


def with_einsum(q, k, v, m):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).masked_fill(~m, INF)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def with_baddbmm(q, k, v, m):
    bias = torch.zeros(m.shape).masked_fill(~m, -1e4).expand(6, 5, 7)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(bias, q, k.mT, beta=1, alpha=0.4)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (2, 3))


def with_heads_in_the_batch(q, k, v, m):
    hidden = ~m.expand(2, 3, 5, 7).flatten(0, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return ((q @ k.mT).masked_fill(hidden, INF).softmax(-1) @ v).unflatten(0, (2, 3))


def with_dropout_that_is_off(q, k, v, m):
    weights = (q @ k.mT).masked_fill(~m, INF).softmax(-1)
    return F.dropout(weights, 0.1, training=False) @ v


@pytest.mark.parametrize(
    "fn", [with_einsum, with_baddbmm, with_heads_in_the_batch, with_dropout_that_is_off]
)
def test_products_are_spelled_as_without_a_mask(becomes, fn):
    assert becomes(fn, inputs(PAIRS))[0] == 1


@pytest.mark.parametrize("mask", [filled, added])
def test_softmax_in_fp32_of_scores_in_bf16(becomes, mask):
    def fn(q, k, v, m):
        return mask((q @ k.mT).float(), m).softmax(-1).to(q.dtype) @ v

    assert becomes(fn, inputs(PAIRS, torch.bfloat16), 3e-2)[0] == 1


def written_behind(q, k, v, m):
    m = m.clone()
    weights = (q @ k.mT).masked_fill(m, -1e9).softmax(-1)
    m.zero_()
    return weights @ v + m.sum()


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (
            by_hand(lambda s, m: s.masked_fill(~m, 0.0)),
            "masks its scores by 0, which hides no key",
        ),
        (by_hand(lambda s, m: s.masked_fill(~m, -5.0)), "by -5, which hides no key"),
        (by_hand(lambda s, m: s.masked_fill(m, -1e9) * -1), "by 1e+09, which hides no key"),
        (
            by_hand(lambda s, m: torch.where(m, s, s.new_zeros(7).sum())),
            "by numbers that are no constant",
        ),
        (
            by_hand(lambda s, m: s.masked_fill(m, INF).masked_fill(~m, -1e9)),
            "its scores are masked by several numbers",
        ),
        (
            by_hand(lambda s, m: (s + m.float()).masked_fill(m, INF)),
            "it both adds to its scores and masks them",
        ),
        (by_hand(lambda s, m: s.masked_fill_(~m, INF)), "writes to its scores in place"),
        (by_hand(lambda s, m: s + m.int()), "adds to its scores no mask of floats"),
        (by_hand(lambda s, m: m.float() - s), "takes its scores away"),
        (written_behind, "%zero_ writes to its mask behind it"),
        (
            by_hand(lambda s, m: s + m.bfloat16()),
            "its mask is in torch.bfloat16, its keys in torch.float32",
        ),
    ],
)
def test_what_is_no_mask_of_sdpa_stays(becomes, fn, why):
    count, (reason, *_) = becomes(fn, inputs(PAIRS))
    assert count == 0
    assert why in reason


def frame_causal(x):
    frame = torch.arange(x.shape[2] * PLACES) // PLACES
    return frame[:, None] >= frame


def over_latents(mask, shown=frame_causal):
    def fn(x):
        q = heads(x.flatten(2).mT)
        return mask(q @ (q * 0.5).mT / math.sqrt(8), shown(x)).softmax(-1) @ (q * 3)

    return fn


@pytest.mark.parametrize(
    "mask", [filled, filled_with_a_low_number, filled_with_the_lowest, chosen, added]
)
def test_masks_over_latents_are_found(trace, apply, mask):
    gm = trace(over_latents(mask), (latents(),))
    apply(gm, "canonicalize,find-attention,sparse-attention")
    (call,) = map(SparseCall.of, SparseCall.nodes(gm.graph))
    assert call.latent_mask is not None
    x = latents()
    with registry.force("sparse"):
        torch.testing.assert_close(gm(x)[0], over_latents(mask)(x))


@pytest.mark.parametrize(
    ("mask", "shown", "why"),
    [
        (
            filled,
            lambda x: torch.ones(x.shape[2] * PLACES, x.shape[2] * PLACES).tril() == 1,
            "nothing shows that it is one for all queries of a latent",
        ),
        (added_low_numbers, frame_causal, "adds to its scores other numbers than 0 and -inf"),
    ],
)
def test_other_masks_stay_dense(trace, apply, mask, shown, why):
    gm = trace(over_latents(mask, shown), (latents(),))
    apply(gm, "canonicalize,find-attention,sparse-attention")
    assert not SparseCall.nodes(gm.graph)
    assert why in describe(gm)


def test_text_that_no_query_hides(trace, apply):
    def fn(x, text):
        q = heads(x.flatten(2).mT)
        key, value = torch.cat([text, q * 0.5], 2), torch.cat([text + 1, q * 3], 2)
        shown = torch.zeros(q.shape[2], text.shape[2], dtype=torch.bool)
        hidden = torch.cat([shown, ~frame_causal(x)], 1)
        return (q @ key.mT * 0.3).masked_fill(hidden, -1e9).softmax(-1) @ value

    args = latents(), kv(6)
    gm = trace(fn, args)
    apply(gm, "canonicalize,find-attention,sparse-attention")
    (call,) = map(SparseCall.of, SparseCall.nodes(gm.graph))
    assert (call.roles, call.latent_mask is not None) == (("text", "current"), True)
    with registry.force("sparse"):
        torch.testing.assert_close(gm(*args)[0], fn(*args))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_model_that_masks_by_hand_is_in_the_receipt():
    fn, x = over_latents(filled_with_a_low_number), latents(6)
    options = {"preset": "sparse", "sparse.budget": 1.0, "inner": "eager"}
    with torch.no_grad(), registry.force("sparse"):
        fast = torch.compile(fn, backend="light_interaction", options=options)
        torch.testing.assert_close(fast(x), fn(x))
    table = lipass.report().table()
    assert "1 rewritten, 0 kept" in table
    assert "softmax(Q K^T) V is scaled_dot_product_attention" in table
