import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lipass.passes.match import Refusal
from lipass.passes.softmax_attention import written_attention


def heads(batch=1, tokens=6):
    return torch.randn(batch, 2, tokens, 4)


@pytest.fixture
def found(trace):
    def run(fn, *args):
        gm = trace(fn, args or (heads(tokens=3), heads(), heads()))
        return written_attention(gm.graph.output_node().args[0][0])

    return run


def by_hand(q, k, v):
    return (q @ k.mT * 0.5).softmax(-1) @ v


def test_operands_are_those_of_sdpa(found):
    one = found(by_hand)
    assert [x.node.name for x in (one.q, one.k, one.v)] == ["l_q_", "l_k_", "l_v_"]
    assert [x.axes for x in (one.q, one.k, one.v)] == [(0, 1, 2, 3)] * 3
    assert (one.out, one.scale) == ((0, 1, 2, 3), 0.5)


def test_axes_that_einsum_orders(found):
    def fn(q, k, v):
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    one = found(fn, *(torch.randn(1, n, 2, 4) for n in (3, 6, 6)))
    assert [x.axes for x in (one.q, one.k, one.v)] == [(0, 2, 1, 3)] * 3
    assert one.out == (0, 2, 1, 3)


def test_wider_products_are_taken_from_in_front_of_their_cast(found):
    def fn(q, k, v):
        return (q.float() @ k.float().mT).softmax(-1).to(v.dtype) @ v

    one = found(fn, *(heads().bfloat16() for _ in range(3)))
    assert [x.node.name for x in (one.q, one.k, one.v)] == ["l_q_", "l_k_", "l_v_"]


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda q, k, v: (q @ k.mT * 0).softmax(-1) @ v, "its scale is 0"),
        (lambda q, k, v: (q @ k.mT * float("inf")).softmax(-1) @ v, "its scale is inf"),
        (
            lambda q, k, v: torch.einsum("bhqk,bhqd->bhkd", (q @ k.mT).softmax(-1), q),
            "its values are not summed over the keys",
        ),
        (
            lambda q, k, v: (q @ k.mT).softmax(-1).double() @ v.double().exp(),
            "its dtypes differ: torch.float32, torch.float64",
        ),
        (
            lambda q, k, v: by_hand(q[:, :, None], k[:, :, None], v[:, :, None]),
            "q, k, v must be [B, H, L, D], got ranks [5, 5, 5]",
        ),
        (
            lambda q, k, v: by_hand(q[0, 0], k[0, 0], v[0, 0]),
            "q, k, v must be [B, H, L, D], got ranks [2, 2, 2]",
        ),
        (
            lambda q, k, v: by_hand(q.expand(3, -1, -1, -1), k, v),
            "q, k and v differ in batch or heads",
        ),
        (lambda q, k, v: by_hand(q, k[:, :1], v), "q, k and v differ in batch or heads"),
    ],
)
def test_what_is_more_than_softmax_over_the_keys(found, fn, why):
    assert found(fn) == Refusal(why)


def autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return by_hand(q, k, v)


def test_products_under_autocast(found):
    why = "its products are in torch.bfloat16 and torch.bfloat16, not in the dtype of what"
    assert found(autocast) == Refusal(f"{why} they multiply")


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_operand_that_is_written_to_between_the_products(found, name):
    def fn(q, k, v):
        given = {"q": q + 1, "k": k + 1, "v": v + 1}
        weights = (given["q"] @ given["k"].mT).softmax(-1)
        given[name].zero_()
        return weights @ given["v"]

    assert found(fn) == Refusal("%zero_ writes to q, k or v between its two products")


@pytest.mark.parametrize("name", ["before", "beside"])
def test_write_that_no_operand_is_changed_by(found, name):
    def fn(q, k, v):
        k, beside = k + 1, q + 1
        if name == "before":
            k.zero_()
        weights = (q @ k.mT).softmax(-1)
        beside.zero_()
        return weights @ v

    assert not isinstance(found(fn), Refusal)


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k, v: q @ k.mT @ v,
        lambda q, k, v: q.softmax(-1) @ k.mT,
        lambda q, k, v: (q @ k.mT).softmax(-1),
        F.scaled_dot_product_attention,
    ],
    ids=["two products", "weights of an input", "weights alone", "sdpa"],
)
def test_what_is_no_attention(found, fn):
    assert found(fn) is None


def test_lookup_in_a_learned_table_is_no_attention(found):
    table = nn.Linear(4, 6, bias=False)
    table.forward = lambda x: (x @ table.weight.mT).softmax(-1).tril() @ table.weight
    assert found(table, torch.randn(3, 4)) is None
