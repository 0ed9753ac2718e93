from dataclasses import replace

import pytest
import torch
from torch.fx import Graph, GraphModule

from lipass.passes.core import PassContext
from lipass.passes.graph.outline import body_of, foreign, put_calls, to_module
from lipass.passes.graph.region import region_of

X = torch.randn(4, 4)


@pytest.fixture
def calls(trace):
    """Return the graph of a function and its calls."""

    def run(fn, *args):
        graph = trace(fn, args).graph
        return graph, [node for node in graph.nodes if node.op.startswith("call")]

    return run


def test_module_computes_what_the_region_does(calls):
    _, nodes = calls(lambda x, y: (x + y).relu(), X, X + 1)
    (out,) = to_module(region_of(nodes), [1])(X, -X + 1)
    torch.testing.assert_close(out, torch.ones(4, 4))


def test_calls_of_one_body_compute_what_the_regions_did(calls):
    def fn(x):
        first = x.relu() * 2
        return first.relu() * 2 + first

    graph, nodes = calls(fn, X)
    regions = [region_of(nodes[0:2]), region_of(nodes[2:4])]
    body = body_of(regions, PassContext.of(graph))
    graph.owning_module.add_module("body", body.module)
    put_calls(graph, regions, body, lambda i, args: graph.call_module("body", tuple(args)))
    assert [node.op for node in graph.nodes].count("call_module") == 2
    (out,) = GraphModule(graph.owning_module, graph)(X)
    assert torch.equal(out, fn(X))


def test_inputs_of_other_strides_are_copied_in_front_of_each_region(calls):
    graph, nodes = calls(lambda x: (x.relu() * 2).mT.relu() * 2, X)
    regions = [region_of(nodes[0:2]), region_of(nodes[3:5])]
    columns = body_of(regions, PassContext.of(graph)).columns
    assert [node.target for node in columns[0]] == ["contiguous", "contiguous"]


def placeholder(value):
    node = Graph().placeholder("x")
    node.meta["example_value"] = value
    return node


def test_tensors_and_sizes_may_go_in(calls):
    _, nodes = calls(lambda x: x.relu() * 2, X)
    assert foreign(region_of(nodes)) is None
    assert foreign(replace(region_of(nodes), inputs=(placeholder(3),))) is None


@pytest.mark.parametrize("given", [None, (X, X), 0.5], ids=["module", "tuple", "float"])
def test_what_is_neither_tensor_nor_size_may_not_go_in(calls, given):
    _, nodes = calls(lambda x: x.relu() * 2, X)
    why = foreign(replace(region_of(nodes), inputs=(placeholder(given),)))
    assert why == "it reads %x, which is neither a tensor nor a size"


def test_what_is_no_tensor_may_not_come_out(calls):
    _, nodes = calls(lambda x: sum(x.relu().chunk(2)), X)
    assert foreign(region_of(nodes[:2])) == "it gives %chunk, which is no tensor"
