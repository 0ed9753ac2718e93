import operator

import pytest
import torch

from lipass.passes.core import PassContext
from lipass.passes.graph.emit import Emitter, emit_behind, refuse_rewrite
from lipass.passes.graph.marks import StepMark, set_step, step_of


@pytest.fixture
def emitter(trace):
    """Return a graph of `x.sum() + 1` and what inserts in front of its sum."""

    def run(args, grown=None, **options):
        gm = trace(lambda x: x.sum(0) + 1, args, grown)
        total = next(node for node in gm.graph.nodes if node.target == "sum")
        return total, Emitter(total, PassContext.of(gm.graph), **options)

    return run


def test_calls_have_true_metadata(emitter):
    total, emit = emitter((torch.randn(2, 3),))
    node = emit(torch.cat, [total.args[0], total.args[0]], 1)
    assert node.meta["example_value"].shape == (2, 6)
    assert node.next is total


def test_methods_have_true_metadata(emitter):
    total, emit = emitter((torch.randn(2, 3),))
    assert emit.method("permute", total.args[0], 1, 0).meta["example_value"].shape == (3, 2)


def test_calls_belong_to_the_module_and_step_of_their_place(emitter):
    total, emit = emitter((torch.randn(2, 3),))
    total.meta["nn_module_stack"] = {"m": ("m", object)}
    set_step(total, StepMark(1, 4))
    node = emit(operator.neg, total.args[0])
    assert step_of(node) == StepMark(1, 4)
    assert node.meta["nn_module_stack"] == {"m": ("m", object)}


def test_calls_outside_belong_to_no_module_and_no_step(emitter):
    total, emit = emitter((torch.randn(2, 3),), inside=False)
    set_step(total, StepMark(1, 4))
    assert step_of(emit(operator.neg, total.args[0])) is None


def test_fixed_size_is_a_constant(emitter):
    total, emit = emitter((torch.randn(2, 3),))
    assert emit.size(3, total.args[0], 1) == 3


def test_size_that_varies_is_read_from_the_tensor(emitter):
    total, emit = emitter((torch.randn(2, 12),), (torch.randn(2, 24),))
    tensor = total.args[0]
    frames, rows, columns = emit.grid((tensor.meta["example_value"].shape[1], 1, 1), tensor)
    assert (rows, columns) == (1, 1)
    assert isinstance(frames, torch.fx.Node)


def test_only_differentiated_calls_are_refused(emitter):
    total, _ = emitter((torch.randn(2, 3),))
    assert refuse_rewrite(total) is None
    total.meta["example_value"] = torch.zeros(2, requires_grad=True)
    assert "torch.no_grad()" in refuse_rewrite(total)


@pytest.fixture
def placed(trace):
    """Emit `logical_not` twice behind the first call; say what is in front and if it is new."""

    def run(fn):
        graph = trace(fn, (torch.zeros(2, 3),)).graph
        theirs = [node for node in graph.nodes if node.op.startswith("call")]
        ctx = PassContext.of(graph)
        one, other = (emit_behind(theirs[0], ctx, torch.logical_not) for _ in range(2))
        assert one is other
        return one.prev.target, one not in theirs

    return run


def test_a_call_behind_a_tensor_is_shared(placed):
    assert placed(lambda x: (x > 0).float() + 1) == (operator.gt, True)


def test_a_call_of_the_user_in_its_place_is_taken(placed):
    assert placed(lambda x: torch.logical_not(x > 0).float()) == (operator.gt, False)


def test_a_call_of_the_user_further_behind_is_not_taken(placed):
    """What asks may stand in front of it."""

    def fn(x):
        shown = x > 0
        return x.sum(), torch.logical_not(shown)

    assert placed(fn) == (operator.gt, True)


def test_a_call_in_front_of_a_write_is_not_taken(placed):
    def fn(x):
        shown = x > 0
        hidden = torch.logical_not(shown)
        shown[:, 0] = False
        return shown, hidden

    assert placed(fn) == (operator.setitem, True)


def test_a_call_whose_result_is_written_to_is_not_taken(placed):
    def fn(x):
        hidden = torch.logical_not(x > 0)
        hidden[:, 0] = False
        return hidden

    assert placed(fn) == (operator.gt, True)


def test_several_calls_behind_one_tensor_are_shared(trace):
    graph = trace(lambda x: (x > 0).float() + 1, (torch.zeros(2, 3),)).graph
    first = next(node for node in graph.nodes if node.op == "call_function")
    ctx = PassContext.of(graph)
    asked = (torch.logical_not, operator.invert, torch.logical_not, operator.invert)
    made = [emit_behind(first, ctx, one) for one in asked]
    assert made[:2] == made[2:]
