"""Give a shared body the sizes that it computes with, so that later guards do not break it.

Behind the passes torch may find two sizes equal, or one constant. A size that is passed as a
number then has another name than the shapes inside, or is no value of the graph any more, and
Inductor stops at both. The shape of a tensor always says what holds; so an input of the graph goes
in that has the size as an axis, and the body reads it there::

    layers(%x, %t);  inside: unflatten(.., 1, (%t, 24))
    layers($latents, %x);  inside: unflatten(.., 1, (sym_size(%latents, 2), 24))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from lipass.passes.core import PassContext
from lipass.passes.graph.compat import Size, is_symbolic, known_true, sizes_of, symbols_of, value
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.outline import Body
from lipass.passes.graph.region import Region
from lipass.passes.graph.writes import writers_of


class _Axis(NamedTuple):
    """Where a size shows as such."""

    node: Node
    axis: int


def give_sizes(body: Body, region: Region, ctx: PassContext) -> None:
    """Change what regions pass to their body, and how it reads sizes.

    Args:
        body: the body; its columns and its graph are changed.
        region: the first of the regions, still in its graph.
        ctx: what passes are given.
    """
    inner = body.module.graph
    for column, own in list(zip(body.columns, _placeholders(inner), strict=True)):
        size = value(column[0])
        if isinstance(size, torch.Tensor):
            continue
        if not is_symbolic(size):
            _put_constant(own, int(size))
        elif (shown := _shown(size, body, region)) is not None:
            _read(own, _taken(shown.node, body), shown.axis)
        else:
            continue
        at = next(i for i, one in enumerate(body.columns) if one is column)
        del body.columns[at]
        inner.erase_node(own)
    for name in sorted(_hidden(body)):
        if (shown := _named(name, region)) is not None:
            _taken(shown.node, body)
        elif (number := Emitter(region.nodes[0], ctx, inside=False).symbol(name)) is not None:
            _taken(number, body)


def _placeholders(graph: Graph) -> list[Node]:
    return list(graph.find_nodes(op="placeholder"))


def _put_constant(own: Node, size: int) -> None:
    for user in list(own.users):
        user.args = map_arg(user.args, lambda one: size if one is own else one)
        user.kwargs = map_arg(user.kwargs, lambda one: size if one is own else one)


def _read(own: Node, tensor: Node, axis: int) -> None:
    """Let the body read a size from a tensor that it takes."""
    if not own.users:
        return
    graph = own.graph
    with graph.inserting_before(_placeholders(graph)[-1].next):
        read = graph.call_function(torch.ops.aten.sym_size.int, (tensor, axis))
    read.meta["example_value"] = value(own)
    own.replace_all_uses_with(read)


def _taken(node: Node, body: Body) -> Node:
    """Return the input of the body for a node of the graph, a new one where it takes no such."""
    inner = body.module.graph
    for column, own in zip(body.columns, _placeholders(inner), strict=True):
        if all(one is node for one in column):
            return own
    body.columns.insert(0, [node] * len(body.columns[0]))
    with inner.inserting_before(next(iter(inner.nodes))):
        own = inner.placeholder(node.name)
    # The first region's own input may have that name, where the others pass another.
    own.target = own.name
    own.meta["example_value"] = value(node)
    return own


def _hidden(body: Body) -> set[str]:
    """Return the symbols that inputs of the body have inside of an expression only."""
    shapes = [sizes_of(value(column[0])) for column in body.columns]
    plain = {str(size) for shape in shapes for size in shape}
    return {name for shape in shapes for size in shape for name in symbols_of(size)} - plain


def _shown(size: Size, body: Body, region: Region) -> _Axis | None:
    """Return where a tensor shows a size, best one that the body takes already."""
    same = (column[0] for column in body.columns if all(one is column[0] for one in column))
    for node in (*same, *_given(region)):
        for axis, one in enumerate(_plain_shape(node)):
            if is_symbolic(one) and known_true(one == size):
                return _Axis(node, axis)
    return None


def _named(name: str, region: Region) -> _Axis | None:
    for node in _given(region):
        for axis, one in enumerate(_plain_shape(node)):
            if str(one) == name:
                return _Axis(node, axis)
    return None


def _given(region: Region) -> list[Node]:
    """List the inputs of the graph that nobody writes to: of others a later state would go in."""
    return [node for node in _placeholders(region.nodes[0].graph) if not writers_of(node)]


def _plain_shape(node: Node) -> tuple[Size, ...]:
    tensor = value(node)
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()
