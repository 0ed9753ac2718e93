import operator

import pytest
import torch
from torch.nn import functional as F

from lipass.passes.graph.compat import value
from lipass.passes.graph.ops import has_effect
from lipass.passes.graph.writes import memory_written, mutates, storage

X, Y = torch.randn(4, 4), torch.randn(4, 4)


@torch.library.custom_op("lipass_tests::store", mutates_args={"into"})
def store(x: torch.Tensor, into: torch.Tensor) -> None:
    into.copy_(x)


store.register_fake(lambda x, into: None)


def set_first_row(x, y):
    x[0] = y[0]
    return x + y


@pytest.fixture
def written(trace):
    """Return the names of the inputs that a function writes to, as its nodes say."""

    def run(fn):
        graph = trace(fn, (X.clone(), Y.clone())).graph
        inputs = {storage(value(n)): n.name for n in graph.find_nodes(op="placeholder")}
        memory = {at for node in graph.nodes for at in memory_written(node)}
        assert bool(memory) <= any(mutates(node) for node in graph.nodes)
        return {inputs[at] for at in memory if at in inputs}

    return run


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (lambda x, y: x.mul_(y), {"l_x_"}),
        (lambda x, y: torch.relu_(x) + y, {"l_x_"}),
        (lambda x, y: F.relu(y, inplace=True) + x, {"l_y_"}),
        (lambda x, y: F.relu(y, True) + x, {"l_y_"}),
        (lambda x, y: F.dropout(y, 0.5, True, True) + x, {"l_y_"}),
        (set_first_row, {"l_x_"}),
        (lambda x, y: operator.iadd(y, x), {"l_y_"}),
        (lambda x, y: x[1:].zero_() + y[1:], {"l_x_"}),
        (lambda x, y: torch.mul(x, 5, out=y), {"l_y_"}),
        (lambda x, y: store(x, y) or x + y, {"l_y_"}),
        (lambda x, y: store(x, into=y.mT) or x + y, {"l_y_"}),
        (lambda x, y: torch._foreach_mul_([x, y], 2.0) or x + y, {"l_x_", "l_y_"}),
    ],
    ids=[
        "method", "function", "inplace", "inplace by position",
        "dropout in place", "setitem", "augmented", "view", "out", "operator",
        "operator by name", "list",
    ],
)  # fmt: skip
def test_memory_that_is_written_to(written, fn, names):
    assert written(fn) == names


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y: x * y,
        lambda x, y: F.relu(x, inplace=False) + y,
        lambda x, y: x.add(y).mul_(2),
        lambda x, y: {"x": x, "y": y}["x"] + 1,
    ],
    ids=["product", "inplace is false", "its own memory", "a dict"],
)
def test_inputs_that_nobody_writes_to(written, fn):
    assert written(fn) == set()


def test_a_kernel_of_triton_may_write_to_each_of_its_tensors(trace):
    """Its call has no body, and no schema says what it writes to."""
    graph = trace(lambda x, y: x + y, (X.clone(), Y.clone())).graph
    x, y = graph.find_nodes(op="placeholder")
    with graph.inserting_after(y):
        call = graph.call_function(
            torch.ops.higher_order.triton_kernel_wrapper_mutation,
            kwargs={"kernel_idx": 0, "grid": [(1, 1, 1)], "kwargs": {"x": x, "out": y}},
        )
    assert mutates(call)
    assert memory_written(call) == {storage(value(x)), storage(value(y))}
    assert has_effect(call)


def test_a_call_of_a_body_writes_what_the_body_writes(trace):
    def fn(x, y):
        return torch.utils.checkpoint.checkpoint(torch.add, x, y, use_reentrant=False)

    graph = trace(fn, (X.clone(), Y.clone())).graph
    assert not any(map(mutates, graph.nodes))
