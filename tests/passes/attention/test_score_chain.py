import pytest
import torch
from torch.nn import functional as F

from lipass.passes.attention.score_chain import Chain, scores


@pytest.fixture
def walk(trace):
    """Return the product that `scores` finds above weights, and what it notes on the way."""

    def run(weigh):
        q, k, v = (torch.randn(1, 2, n, 4) for n in (3, 5, 5))
        gm = trace(lambda q, k, v: weigh(q @ k.mT) @ v, (q, k, v))
        (root,) = gm.graph.output_node().args[0]
        chain = Chain()
        return scores(root.args[0], root, chain), chain

    return run


def test_scale_is_gathered_in_front_of_the_softmax(walk):
    found, chain = walk(lambda s: ((3 * s) / 4).softmax(-1))
    assert (found.node.name, chain.softmax.name) == ("matmul", "softmax")
    assert (chain.scale, chain.why) == (0.75, "")


@pytest.mark.parametrize(
    "weigh",
    [
        lambda s: s.contiguous().softmax(-1),
        lambda s: s.double().softmax(-1).to(s.dtype),
        lambda s: F.softmax(s, dim=3, dtype=torch.float64).float(),
        lambda s: F.dropout(s.softmax(-1), 0.1, training=False),
        lambda s: F.dropout(s.softmax(-1), 0.0),
    ],
    ids=["copy", "casts", "dtype of the softmax", "dropout in eval", "dropout of nothing"],
)
def test_what_plain_attention_does_too(walk, weigh):
    found, chain = walk(weigh)
    assert found is not None
    assert (chain.why, chain.scale) == ("", 1.0)


@pytest.mark.parametrize(
    ("weigh", "why"),
    [
        (lambda s: F.dropout(s, 0.2).softmax(-1), "dropout is 0.2"),
        (lambda s: (s / 0).softmax(-1), "its scale is infinite"),
        (lambda s: s.softmax(-1).sigmoid(), "%sigmoid changes its weights"),
        (lambda s: s.softmax(-1).tanh(), "%tanh changes its weights"),
        (lambda s: F.dropout(s.softmax(-1)), "dropout is 0.5"),
        (lambda s: s.sub(1).softmax(-1), "%sub adds to its scores"),
        (lambda s: s.softmax(-1) + 1, "%add adds to its weights"),
        (lambda s: torch.triu(s).softmax(-1), "%triu masks its scores"),
        (lambda s: (8 / s).softmax(-1), "%truediv changes its scores"),
        (lambda s: s.div(8, rounding_mode="floor").softmax(-1), "%div changes its scores"),
        (lambda s: (s // 8).softmax(-1), "%floordiv changes its scores"),
        (lambda s: F.relu(s).softmax(-1), "%relu changes its scores"),
        (lambda s: F.log_softmax(s, -1), "%log_softmax changes its weights"),
        (lambda s: s.softmax(-1).flip(-1), "%flip changes its weights"),
        (lambda s: torch.ones_like(s), "%ones_like changes its weights"),
        (lambda s: s.softmax(-1).mul_(2), "%mul_ writes to its weights in place"),
        (lambda s: F.relu(s, inplace=True).softmax(-1), "%relu writes to its scores in place"),
    ],
)
def test_first_thing_above_the_values_that_plain_attention_does_not_do(walk, weigh, why):
    _, chain = walk(weigh)
    assert chain.why == why


def test_of_two_reasons_the_lower_one_is_given(walk):
    _, chain = walk(lambda s: (s + 1).tril().softmax(-1))
    assert chain.why == "%tril masks its scores"


@pytest.mark.parametrize(
    "weigh",
    [
        lambda s: s.mT.contiguous().mT.softmax(-1),
        lambda s: s.argsort(-1).float(),
        lambda s: s.mean((0, 1, 2, 3)).expand(s.shape),
        lambda s: F.layer_norm(s, (5,)),
    ],
    ids=["moved axes", "ranks", "mean", "layer norm"],
)
def test_weights_that_come_from_no_scores(walk, weigh):
    assert walk(weigh)[0] is None


@pytest.mark.parametrize("name", ["exp", "tanh", "silu"])
def test_activation_in_place_of_softmax(walk, name):
    weigh = getattr(F, name, None) or getattr(torch, name)
    _, chain = walk(lambda s: weigh(s * 2))
    assert chain.no_softmax() == f"its weights come from {name}, not from softmax"
    assert chain.scale == 1.0


def test_chain_of_nothing_has_nothing_in_place_of_softmax():
    assert Chain().no_softmax() == ""
