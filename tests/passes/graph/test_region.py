import pytest
import torch
from torch.nn import functional as F

from lipass.passes.graph.region import alias, difference, impurity, region_of


@pytest.fixture
def region(trace):
    """Return the region of all calls of a function."""

    def run(fn, *args):
        gm = trace(fn, args)
        return region_of([node for node in gm.graph.nodes if node.op.startswith("call")])

    return run


X = torch.randn(4, 4)


def test_inputs_and_outputs(region):
    found = region(lambda x, y: (x + y).relu(), X, X + 1)
    assert [node.op for node in found.inputs] == ["placeholder", "placeholder"]
    assert [node.target for node in found.outputs] == ["relu"]


def test_equal_calls_are_equal(region):
    first, second = (region(lambda x: x.relu() * 2, X) for _ in range(2))
    assert difference(first, second) is None


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (lambda x: x.relu() * 3, "%mul and %mul differ"),
        (lambda x: x.relu() * 2.0, "%mul and %mul differ"),
        (lambda x: 2 * x.relu(), "%mul and %mul differ"),
        (lambda x: x.relu() * 2 + 1, "they have 2 and 3 nodes"),
    ],
)
def test_calls_that_differ(region, other, why):
    assert difference(region(lambda x: x.relu() * 2, X), region(other, X)) == why


def test_inputs_that_differ_in_shape(region):
    regions = [region(lambda x: x.relu() * 2, x) for x in (X, X[:2])]
    assert "differ in shape or dtype" in difference(*regions)


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda x: x.relu() * 2, None),
        (lambda x: x.relu().mul_(2), None),
        (lambda x: F.dropout(x, 0.1, False) + 1, None),
        (lambda x: x.mul_(2) + 1, "%mul_ writes to the input x"),
        (lambda x: F.dropout(x, 0.1, True) + 1, "%dropout draws random numbers"),
        (lambda x: x + torch.rand(4), "%rand draws random numbers"),
    ],
)
def test_impurity(region, fn, why):
    assert impurity(region(fn, X.clone())) == why


def test_outputs_that_share_memory_with_an_input(region):
    assert alias(region(lambda x: x * 2, X)) is None
    assert "shares memory with" in alias(region(lambda x: x.transpose(0, 1), X))
