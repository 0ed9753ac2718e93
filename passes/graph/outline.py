"""Cut equal regions out of a graph: one body of its own, and a call of it in place of each."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from lipass.passes.core import PassContext
from lipass.passes.graph.compat import known_true, sizes_of, symbols_of, value
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.region import Region

Call = Callable[[int, list[Node]], Node]


class Body(NamedTuple):
    """What equal regions compute, and what each gives it."""

    module: GraphModule
    columns: list[list[Node]]
    """For each input of the body, the node that each region passes."""
    positions: list[int]
    """Where the outputs of the body stand in `region.nodes`."""


def foreign(region: Region) -> str | None:
    """Say what goes in or out that a subgraph cannot take or give, or return None.

    A submodule (the mask function of FlexAttention) or a tuple is neither tensor nor size.
    """
    for node in region.inputs:
        if not isinstance(value(node), (torch.Tensor, torch.SymInt, int)):
            return f"it reads %{node.name}, which is neither a tensor nor a size"
    for node in region.outputs:
        if not isinstance(value(node), torch.Tensor):
            return f"it gives %{node.name}, which is no tensor"
    return None


def body_of(regions: list[Region], ctx: PassContext) -> Body:
    """Copy the first of some equal regions into a module, with the outputs that any of them has.

    Inputs whose strides differ between the regions become contiguous in front of each.
    """
    positions = sorted({r.nodes.index(node) for r in regions for node in r.outputs})
    columns = [
        _equal_strides(list(column), regions, ctx)
        for column in zip(*(region.inputs for region in regions), strict=True)
    ]
    module = to_module(regions[0], positions)
    for node, column in zip(module.graph.find_nodes(op="placeholder"), columns, strict=True):
        node.meta["example_value"] = value(column[0])
    return Body(module, columns, positions)


def put_calls(graph: Graph, regions: list[Region], body: Body, call: Call) -> None:
    """Put a call behind the last node of each region, in order, and erase the regions.

    Args:
        graph: the graph that holds the regions.
        regions: the regions in order.
        body: what they share.
        call: makes the call of the i-th region, given its inputs.
    """
    replaced: dict[Node, Node] = {}
    for i, region in enumerate(regions):
        args = [replaced.get(column[i], column[i]) for column in body.columns]
        with graph.inserting_before(region.nodes[-1].next):
            made = call(i, args)
            made.meta["example_value"] = tuple(value(region.nodes[p]) for p in body.positions)
            for n, position in enumerate(body.positions):
                node = region.nodes[position]
                result = graph.call_function(operator.getitem, (made, n))
                result.meta["example_value"] = value(node)
                _replace_outside(region, node, result)
                replaced[node] = result
        for node in reversed(region.nodes):
            graph.erase_node(node)


def _replace_outside(region: Region, node: Node, result: Node) -> None:
    inside = set(region.nodes)
    node.replace_all_uses_with(result, lambda user: user not in inside)


def to_module(region: Region, outputs: list[int]) -> GraphModule:
    """Copy a region into a module of its own; `outputs` are positions in `region.nodes`."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in region.inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta["example_value"] = value(node)
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[region.nodes[i]] for i in outputs))
    return GraphModule(torch.nn.Module(), graph)


def hidden_sizes(region: Region, ctx: PassContext) -> list[Node]:
    """Return nodes of the sizes that no input has as such, only inside of an expression.

    An inner compiler reads the sizes of a subgraph from its inputs; `[B, n - 4]` does not give n.
    """
    shapes = [sizes_of(value(node)) for node in region.inputs]
    plain = {str(size) for shape in shapes for size in shape}
    hidden = {name for shape in shapes for size in shape for name in symbols_of(size)} - plain
    emit = Emitter(region.nodes[0], ctx, inside=False)
    return [size for name in sorted(hidden) if (size := emit.symbol(name)) is not None]


def _equal_strides(column: list[Node], regions: list[Region], ctx: PassContext) -> list[Node]:
    """Return one input of all regions with equal strides, as a body compiled once needs them."""
    tensors = [value(node) for node in column]
    if not isinstance(tensors[0], torch.Tensor) or all(
        _same_strides(tensors[0], t) for t in tensors
    ):
        return column
    return [
        _contiguous(node, region.nodes[0], ctx)
        for node, region in zip(column, regions, strict=True)
    ]


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    return all(known_true(x == y) for x, y in zip(a.stride(), b.stride(), strict=True))


def _contiguous(node: Node, before: Node, ctx: PassContext) -> Node:
    with before.graph.inserting_before(before):
        copy = before.graph.call_method("contiguous", (node,))
    with ctx.fake_mode:
        copy.meta["example_value"] = value(node).contiguous()
    return copy
