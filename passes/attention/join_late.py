"""Move what lies between a concatenation of keys and their attention in front of the former."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lipass.passes.core import PassContext
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import Size, guard, known_true, value
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.ops import is_cast, is_reshape, moved_axes
from lipass.passes.graph.writes import memory_written, storage, writes_between


def join_late(call: Node, ctx: PassContext) -> bool:
    """Let k and v of an attention call be concatenations along the tokens, as matchers read them.

    ::

        %all = cat([%hist, %cur], 1);  %k = %all.transpose(1, 2)
        %k = cat([%hist.permute(0, 2, 1, 3), %cur.permute(0, 2, 1, 3)], 2)

    Two streams that are stacked on the batch are stacked piece by piece::

        %k = cat([cat([%hist_a, %a], 2), cat([%hist_b, %b], 2)], 0)
        %k = cat([cat([%hist_a, %hist_b], 0), cat([%a, %b], 0)], 2)

    Keeps: calls between with other users, or that mix tokens with other axes; pieces that are
    written to before the attention, which reads them later than the concatenation did.
    """
    changed = False
    for index in (1, 2):
        key = call.args[index]
        if isinstance(key, Node) and (joined := _joined(key, call, ctx)) is not None:
            call.update_arg(index, joined)
            changed = True
    return changed


def _joined(key: Node, call: Node, ctx: PassContext) -> Node | None:
    path: list[tuple[Node, int]] = []
    node, axis = key, 2
    if value(key).dim() != 4:
        return None
    while not (is_call(node, torch.cat) and node.args[1] == axis):
        if _is_stack(node, axis):
            if not path and len(node.users) == 1 and _is_unwritten(node, call):
                return _stack_pieces(node, axis, call, ctx)
            return None
        above = _axis_above(node, axis)
        if above is None or len(node.users) > 1:
            return None
        path.append((node, axis))
        node, axis = node.all_input_nodes[0], above
    if not path or not _is_unwritten(node, call):
        return None
    emit = Emitter(call, ctx)
    parts: Any = node.args[0]
    pieces = []
    for piece in parts:
        for step, below in reversed(path):
            piece = _replay(step, below, piece, emit)
        pieces.append(piece)
    return emit(torch.cat, pieces, 2)


def _axis_above(node: Node, axis: int) -> int | None:
    """Return which axis of its input an axis of a node is, if the node leaves it whole."""
    if (moved := moved_axes(node)) is not None:
        return moved[axis]
    if is_cast(node):
        return axis
    if not is_reshape(node):
        return None
    above, below = value(node.all_input_nodes[0]).shape, value(node).shape
    for i, size in enumerate(above):
        front = known_true(_volume(above[:i]) == _volume(below[:axis]))
        back = known_true(_volume(above[i + 1 :]) == _volume(below[axis + 1 :]))
        if front and back and known_true(size == below[axis]):
            return i if _sizes(node, axis) is not None else None
    return None


def _volume(sizes: torch.Size) -> Size:
    product: Size = 1
    for size in sizes:
        product = product * size
    return product


def _sizes(node: Node, axis: int) -> list[int] | None:
    """Return the sizes of a reshaped piece, whose tokens are counted by -1."""
    sizes = [-1 if i == axis else size for i, size in enumerate(value(node).shape)]
    return sizes if all(isinstance(size, int) for size in sizes) else None


def _replay(step: Node, axis: int, piece: Node, emit: Emitter) -> Node:
    if (moved := moved_axes(step)) is not None:
        return emit.method("permute", piece, *moved)
    if is_reshape(step):
        sizes = _sizes(step, axis)
        assert sizes is not None
        return emit.method("reshape", piece, *sizes)
    if value(step).dtype == value(piece).dtype:
        return piece
    return emit.method("to", piece, value(step).dtype)


def _is_stack(node: Node, axis: int) -> bool:
    """Whether a node stacks concatenations of equal pieces along another axis."""
    if not is_call(node, torch.cat) or node.args[1] == axis:
        return False
    streams: Any = node.args[0]
    if not all(is_call(x, torch.cat) and x.args[1] == axis for x in streams):
        return False
    if len({len(x.args[0]) for x in streams}) > 1:
        return False
    columns = zip(*(x.args[0] for x in streams), strict=True)
    return all(
        guard(value(x).shape[axis] == value(column[0]).shape[axis])
        for column in columns
        for x in column
    )


def _stack_pieces(node: Node, axis: int, call: Node, ctx: PassContext) -> Node:
    emit = Emitter(call, ctx)
    streams: Any = node.args[0]
    columns = zip(*(x.args[0] for x in streams), strict=True)
    return emit(torch.cat, [emit(torch.cat, list(c), node.args[1]) for c in columns], axis)


def _is_unwritten(joined: Node, call: Node) -> bool:
    """Whether nothing writes to the pieces between their concatenation and the call."""
    memory = {storage(value(x)) for x in (joined, *joined.all_input_nodes)}
    for above in joined.all_input_nodes:
        memory.update(storage(value(x)) for x in above.all_input_nodes)
    first = min((joined, *joined.all_input_nodes), key=list(joined.graph.nodes).index)
    return not any(memory_written(n) & memory for n in writes_between(first, call))
