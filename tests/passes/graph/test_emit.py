import operator

import pytest
import torch

from lipass.passes.core import PassContext
from lipass.passes.graph.emit import Emitter, refuse_rewrite
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
