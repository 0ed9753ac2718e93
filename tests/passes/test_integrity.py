import operator

import pytest
import torch

from lipass.passes import integrity as module
from lipass.passes.core import PassContext, PassError
from lipass.passes.graph.emit import Emitter
from lipass.passes.integrity import check_integrity, snapshot


def graph_of(trace, fn=None, *args):
    fn = fn or (lambda x, y: (x.mT.contiguous() * 2 + y).relu())
    gm = trace(fn, args or (torch.randn(3, 4), torch.randn(4, 3)))
    return gm.graph, PassContext.of(gm.graph), snapshot(gm.graph)


def node(graph, name):
    return next(n for n in graph.nodes if n.name == name)


def test_untouched_graph_passes(trace):
    graph, ctx, before = graph_of(trace)
    check_integrity(graph, before, ctx)


def test_new_node_with_true_metadata_passes(trace):
    graph, ctx, before = graph_of(trace)
    relu = node(graph, "relu")
    relu.args = (Emitter(relu, ctx)(torch.neg, relu.args[0]),)
    check_integrity(graph, before, ctx)


def test_new_node_without_metadata(trace):
    graph, ctx, before = graph_of(trace)
    relu = node(graph, "relu")
    with graph.inserting_before(relu):
        relu.args = (graph.call_function(torch.neg, (relu.args[0],)),)
    with pytest.raises(PassError, match="neg has no example_value; insert it with an Emitter"):
        check_integrity(graph, before, ctx)


def test_metadata_of_another_shape(trace):
    graph, ctx, before = graph_of(trace)
    relu = node(graph, "relu")
    new = Emitter(relu, ctx)(torch.neg, relu.args[0])
    new.meta["example_value"] = new.meta["example_value"][:1]
    relu.args = (new,)
    with pytest.raises(PassError, match=r"neg is torch.float32\[4, 3\].*metadata says.*\[1, 3\]"):
        check_integrity(graph, before, ctx)


def test_changed_call_of_another_dtype(trace):
    graph, ctx, before = graph_of(trace)
    mul = node(graph, "mul")
    mul.target, mul.args = torch.gt, (mul.args[0], 2)
    with pytest.raises(PassError, match=r"mul is torch.bool\[4, 3\]"):
        check_integrity(graph, before, ctx)


def test_shape_that_changes_downstream(trace):
    def fn(x):
        return (x[:2] + 1).sum(0)

    graph, ctx, before = graph_of(trace, fn, torch.randn(3, 4))
    get = next(n for n in graph.nodes if n.target is operator.getitem)
    get.args = (get.args[0], slice(None, 3))
    with pytest.raises(PassError, match="getitem"):
        check_integrity(graph, before, ctx)


def test_strides_may_change_and_metadata_follows(trace):
    graph, ctx, before = graph_of(trace)
    contiguous = node(graph, "contiguous")
    contiguous.replace_all_uses_with(contiguous.args[0])
    graph.erase_node(contiguous)
    check_integrity(graph, before, ctx)
    assert node(graph, "mul").meta["example_value"].stride() == (1, 4)


def test_call_that_does_not_run(trace):
    graph, ctx, before = graph_of(trace)
    node(graph, "contiguous").target = "no_such_method"
    with pytest.raises(PassError, match="contiguous does not run on its inputs"):
        check_integrity(graph, before, ctx)


def test_new_write_to_an_input(trace):
    graph, ctx, before = graph_of(trace)
    relu = node(graph, "relu")
    relu.target = "relu_"
    with pytest.raises(PassError, match="a pass adds no mutation, got relu"):
        check_integrity(graph, before, ctx)


def test_output_that_becomes_an_input(trace):
    graph, ctx, before = graph_of(trace)
    x = graph.find_nodes(op="placeholder")[0]
    graph.output_node().args = ((x,),)
    with pytest.raises(PassError, match="adds no aliasing, got output 0 in the memory of l_x_"):
        check_integrity(graph, before, ctx)


def test_output_that_was_an_input_passes(trace):
    graph, ctx, before = graph_of(trace, lambda x: (x.mT, x + 1), torch.randn(3, 4))
    check_integrity(graph, before, ctx)


def test_node_used_before_it_is_defined(trace):
    graph, ctx, before = graph_of(trace)
    node(graph, "contiguous").prepend(node(graph, "relu"))
    with pytest.raises(PassError, match="used before it has been defined"):
        check_integrity(graph, before, ctx)


def test_write_that_was_there_passes(trace):
    def fn(x):
        y = x + 1
        y[0] = 0
        y.mul_(2)
        return y.mT.relu()

    graph, ctx, before = graph_of(trace, fn, torch.randn(3, 4))
    check_integrity(graph, before, ctx)


def test_equal_calls_of_other_layers_are_not_run_again(trace, monkeypatch):
    def fn(x):
        for _ in range(6):
            x = x.relu() * 2
        return x

    gm = trace(fn, (torch.randn(3, 4),))
    before = snapshot(gm.graph)
    for node in gm.graph.find_nodes(op="call_method", target="relu"):
        node.target = "clamp_min"
        node.args = (*node.args, 0)
    runs, run = [], module._run
    monkeypatch.setattr(module, "_run", lambda graph, node: runs.append(node) or run(graph, node))
    check_integrity(gm.graph, before, PassContext.of(gm.graph))
    assert len(runs) == 1


def test_wrong_metadata_of_one_of_many_equal_calls_is_found(trace):
    gm = trace(lambda x: x.relu().relu().relu() * 2, (torch.randn(3, 4),))
    before = snapshot(gm.graph)
    nodes = gm.graph.find_nodes(op="call_method", target="relu")
    for node in nodes:
        node.args = tuple(node.args)
    wrong = nodes[-1].meta["example_value"]
    with wrong.fake_mode:
        nodes[-1].meta["example_value"] = torch.empty(4, 3)
    with pytest.raises(PassError, match="but its metadata says"):
        check_integrity(gm.graph, before, PassContext.of(gm.graph))
