import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lipass.passes.attention.match import Refusal
from lipass.passes.attention.softmax_attention import written_attention

INPUTS = tuple(torch.randn(1, 2, tokens, 4) for tokens in (3, 6, 6))


@pytest.fixture
def found(trace):
    def run(fn, *args):
        gm = trace(fn, args or INPUTS)
        return written_attention(gm.graph.output_node().args[0][0])

    return run


def by_hand(q, k, v):
    return (q @ k.mT * 0.5).softmax(-1) @ v


def test_operands_are_those_of_sdpa(found):
    one = found(by_hand)
    assert [x.node.name for x in (one.q, one.k, one.v)] == ["l_q_", "l_k_", "l_v_"]
    assert [x.axes for x in (one.q, one.k, one.v)] == [(0, 1, 2, 3)] * 3
    assert (one.out, one.scale) == ((0, 1, 2, 3), 0.5)


def written_by_out(q, k, v):
    keys, other = k * 1, k + 1
    weights = (q @ keys.mT).softmax(-1)
    torch.mul(other, 2, out=keys)
    return weights @ v + keys.sum()


def written_in_a_list(q, k, v):
    values = v * 1
    weights = (q @ k.mT).softmax(-1)
    torch._foreach_mul_([q, values], 2.0)
    return weights @ values


@pytest.mark.parametrize("fn", [written_by_out, written_in_a_list])
def test_operands_that_are_written_to_in_between(fn, trace):
    for node in trace(fn, INPUTS).graph.nodes:
        said = written_attention(node) if node.op.startswith("call") else None
        if said is not None:
            assert "writes to q, k or v between its two products" in said.reason


def test_axes_that_einsum_orders(found):
    def fn(q, k, v):
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    one = found(fn, *(x.transpose(1, 2) for x in INPUTS))
    assert [x.axes for x in (one.q, one.k, one.v)] == [(0, 2, 1, 3)] * 3
    assert one.out == (0, 2, 1, 3)


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
            lambda q, k, v: by_hand(q[0, 0], k[0, 0], v[0, 0]),
            "q, k, v must be [B, H, L, D], got ranks [2, 2, 2]",
        ),
        (lambda q, k, v: by_hand(q, k[:, :1], v), "q, k and v differ in batch or heads"),
        (
            lambda q, k, v: (q.bfloat16() @ k.bfloat16().mT).softmax(-1).float() @ v,
            "its dtypes differ: torch.bfloat16, torch.float32",
        ),
    ],
)
def test_what_is_more_than_softmax_over_the_keys(found, fn, why):
    assert found(fn) == Refusal(why)


def test_products_in_another_dtype_than_their_operands(found):
    @torch.autocast("cpu", torch.bfloat16)
    def fn(q, k, v):
        return by_hand(q, k, v)

    why = "its products are in torch.bfloat16 and torch.bfloat16, not in the dtype of what"
    assert found(fn) == Refusal(f"{why} they multiply")


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_operand_that_is_written_to_between_the_products(found, name):
    def fn(q, k, v):
        given = {"q": q + 1, "k": k + 1, "v": v + 1}
        weights = (given["q"] @ given["k"].mT).softmax(-1)
        given[name].zero_()
        return weights @ given["v"]

    assert found(fn) == Refusal("%zero_ writes to q, k or v between its two products")


def test_writes_that_change_no_operand_in_between(found):
    def fn(q, k, v):
        k, beside = k + 1, q + 1
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
        F.scaled_dot_product_attention,
    ],
    ids=["two products", "weights of an input", "sdpa"],
)
def test_what_is_no_attention(found, fn):
    assert found(fn) is None


def test_lookup_in_a_learned_table_is_no_attention(found):
    table = nn.Linear(4, 6, bias=False)
    table.forward = lambda x: (x @ table.weight.mT).softmax(-1).tril() @ table.weight
    assert found(table, torch.randn(3, 4)) is None
