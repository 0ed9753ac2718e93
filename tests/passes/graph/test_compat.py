import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lipass.passes.graph.compat import (
    constant,
    divides,
    fake_mode_of,
    guard,
    holds_now,
    is_parameter,
    is_symbolic,
    known_true,
    undisturbed,
    value,
    why_no_guard,
    without_vmap,
)


@pytest.fixture
def size(trace):
    """Return the symbolic first size of an input that was 12 and then 24."""
    gm = trace(lambda x: x + 1, (torch.randn(12, 3),), (torch.randn(24, 3),))
    node = next(n for n in gm.graph.nodes if isinstance(value(n), torch.Tensor))
    return value(node).shape[0]


def test_value_of_what_is_no_node_is_itself():
    assert value(3) == 3
    assert value(None) is None


def test_fixed_and_varying_sizes(size):
    assert is_symbolic(size)
    assert not is_symbolic(3)


def test_a_size_that_a_guard_ties_to_one_number_is_plain(size):
    assert constant(size) is size
    assert size == 24  # guards
    assert isinstance(size, torch.SymInt)
    assert isinstance(constant(size), int)
    assert constant(size) == 24
    assert isinstance(constant(size**-0.5), float)
    assert constant(size**-0.5) == 24**-0.5


def test_a_plain_number_is_what_it_was():
    assert constant(3) == 3
    assert constant(0.5) == 0.5


def test_knowing_adds_no_guard_and_guarding_does(size):
    guards = size.node.shape_env.guards
    before, condition = len(guards), divides(4, size)
    assert not known_true(condition)
    assert holds_now(condition)
    assert len(guards) == before
    assert guard(condition)
    assert len(guards) > before
    assert known_true(divides(4, size))


def test_condition_that_does_not_hold_is_no_guard(size):
    before = len(size.node.shape_env.guards)
    assert not guard(divides(7, size))
    assert len(size.node.shape_env.guards) == before


def declared(trace, **limits):
    """Return the first sizes of two inputs, the first of which is declared as dynamic."""
    args = torch.randn(48, 3), torch.randn(7, 5)
    torch._dynamo.mark_dynamic(args[0], 0, **limits)
    gm = trace(lambda x, y: (x + 1, y + 1), args)
    tensors = [value(n) for n in gm.graph.nodes if n.op == "placeholder"]
    return [x.shape[0] for x in tensors if isinstance(x, torch.Tensor)]


def test_guard_that_a_declared_range_does_not_allow(trace):
    size, _ = declared(trace, min=16, max=640)
    assert not guard(divides(16, size))
    assert why_no_guard(divides(16, size)) == (
        "mark_dynamic declares sizes from 16 to 640, and it does not hold for all of them"
    )
    assert not size.node.shape_env.guards
    assert guard(size >= 16)


def test_guard_that_would_fix_what_is_declared_as_varying(trace):
    size, other = declared(trace)
    assert guard(divides(16, size))
    assert not guard(size // 16 + 4 == other)
    assert not guard(size == 48)
    assert why_no_guard(size == 48).startswith("mark_dynamic declares that the size varies")


def test_fake_mode_is_that_of_the_graph(trace):
    gm = trace(lambda x: x + 1, (torch.randn(3),))
    node = next(n for n in gm.graph.nodes if isinstance(value(n), FakeTensor))
    assert fake_mode_of(gm.graph) is value(node).fake_mode
    assert isinstance(fake_mode_of(torch.fx.Graph()), FakeTensorMode)


def test_parameters_are_no_inputs(trace):
    gm = trace(torch.nn.Linear(3, 3), (torch.randn(2, 3),))
    kinds = [is_parameter(node) for node in gm.graph.find_nodes(op="placeholder")]
    assert sorted(kinds) == [False, True, True]


def test_real_numbers_in_the_middle_of_a_compilation():
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16), undisturbed():
        x = torch.ones(2, 2) @ torch.ones(2, 2)
    assert not isinstance(x, FakeTensor)
    assert x.dtype == torch.float32
    assert x.sum() == 8


def test_tensor_inside_vmap():
    seen = []
    x = torch.randn(3, 2)
    torch.vmap(lambda row: seen.append(without_vmap(row)) or row * 2)(x)
    assert seen[0].shape == (3, 2)
    assert without_vmap(x) is x
