import pytest
import torch

from lipass.passes.graph.worth import worth_once

X = torch.randn(4, 6)


def views_only(x):
    return x.transpose(0, 1)[:2].reshape(-1) + 0


def views_in_front(x):
    return x.transpose(0, 1)[:2].sin()


def views_behind(x):
    return x.sin().transpose(0, 1)[:2]


def views_between(x):
    return x.sin().transpose(0, 1).cos()


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (views_only, []),
        (views_in_front, ["transpose", "getitem", "sin"]),
        (views_behind, ["sin", "transpose", "getitem"]),
        (views_between, ["sin", "transpose", "cos"]),
    ],
)
def test_views_go_with_the_computation_beside_them(trace, fn, names):
    nodes = [node for node in trace(fn, (X,)).graph.nodes if node.op.startswith("call")]
    candidates = [node for node in nodes if node.name != "add"]
    kept = worth_once(candidates)
    assert [getattr(node.target, "__name__", node.target) for node in kept] == names


def test_numbers_are_not_worth_keeping(trace):
    nodes = list(trace(lambda x: x * x.size(0), (X,), grown=(torch.randn(8, 6),)).graph.nodes)
    sizes = [node for node in nodes if node.op == "call_method" and node.target == "size"]
    assert worth_once(sizes) == []


def test_order_stays(trace):
    def fn(x, y):
        a, b = y.mT, x.mT
        return b.sin() + a.cos()

    nodes = [node for node in trace(fn, (X, X)).graph.nodes if node.op.startswith("call")]
    assert worth_once(nodes) == nodes
