"""The sparse call is read and written by name: nothing is lost and nothing depends on an order."""

import dataclasses

import torch
from torch.fx import Graph

import lipass.kernels.distinct
import lipass.kernels.pieces  # noqa: F401
from lipass.passes.attention.site import AttentionSite, rename_site, site_of
from lipass.passes.attention.sparse_call import SparseCall
from lipass.passes.graph.arguments import arguments


def sparse_graph(**named):
    """Hold one call, its arguments written as nobody else would: all by name."""
    graph = Graph()
    q, k, v, keep = (graph.placeholder(name) for name in ("q", "k", "v", "keep"))
    given = {
        "q": q, "k": [k], "v": [v], "q_grid": [2, 4, 4], "kv_grids": [2, 4, 4], "roles": "current",
        "tile": [1, 4, 4], "budget": 0.5, "scale": 0.25, "sink_latents": 1, "role": "prefill",
        "keep_frames": keep, "site": "layer",
    }  # fmt: skip
    node = graph.call_function(torch.ops.lipass.sparse_attention.default, (), {**given, **named})
    graph.output(node)
    return graph, node


def test_every_argument_of_the_schema_is_a_field_and_the_reverse():
    schema = torch.ops.lipass.sparse_attention.default._schema.arguments
    assert [one.name for one in schema] == [f.name for f in dataclasses.fields(SparseCall)]


def test_arguments_by_keyword_and_by_position_read_alike():
    _, node = sparse_graph()
    call = SparseCall.of(node)
    assert (call.tile, call.budget, call.role, call.keep_frames.name) == (
        (1, 4, 4), 0.5, "prefill", "keep",
    )  # fmt: skip
    call.write(node)
    assert len(node.args) == 13
    assert node.kwargs == {}
    assert SparseCall.of(node) == call


def test_what_is_not_changed_stays():
    graph, node = sparse_graph()
    means = graph.placeholder("means")
    call = dataclasses.replace(SparseCall.of(node), history_means=means, planner="given")
    call.write(node)
    assert node.kwargs == {"history_means": means, "planner": "given"}
    dataclasses.replace(SparseCall.of(node), budget=0.1).write(node)
    assert SparseCall.of(node) == dataclasses.replace(call, budget=0.1)


def test_calls_of_a_graph_are_listed_in_order():
    graph, node = sparse_graph()
    assert SparseCall.nodes(graph) == [node]
    assert SparseCall.is_one(node)
    assert not any(SparseCall.is_one(other) for other in graph.nodes if other is not node)


def test_renaming_a_site_changes_what_it_counts_as_and_no_other_argument():
    graph = Graph()
    q = graph.placeholder("q")
    for target, given in (
        (torch.ops.lipass.attend_pieces.default, (q, [q], [q], 0.5, "decode")),
        (torch.ops.lipass.attend_distinct.default, (q, q, q, q, 0.5, "decode")),
    ):
        node = graph.call_function(target, given)
        rename_site(node, AttentionSite("decode", "", "decode", None, (), 0.5), "layer")
        assert arguments(node)["site"] == "layer"
        assert node.args[:-1] == given[:-1]
        assert site_of(node).name == "layer"
    _, node = sparse_graph(site="prefill")  # the name of a site may be the word of a role
    rename_site(node, AttentionSite("prefill", "", "prefill", None, (), 0.5), "layer")
    call = SparseCall.of(node)
    assert (call.site, call.role) == ("layer", "prefill")
