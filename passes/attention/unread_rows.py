"""Leave out queries whose rows nobody reads, such as those that fill up a block."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from lipass.passes.attention.match import written_late
from lipass.passes.attention.site import SDPA
from lipass.passes.core import PassContext
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.names import module_path
from lipass.passes.graph.ops import moved_axes

_NOTHING = slice(None)


def drop_unread_rows(call: Node, ctx: PassContext) -> bool:
    """Attend from the first of joined queries where the rows of the others are cut off.

    ::

        %q = cat([%own, %zeros], 2)
        %o = scaled_dot_product_attention(%q, %k, %v)[:, :, :n]

        %o = scaled_dot_product_attention(%own, %k, %v)

    FlexAttention wants whole blocks of 128, and models join zeros for it. Keys stay as they are:
    those of zeros are seen.
    """
    if not is_call(call, SDPA) or not call.kwargs.keys() <= {"scale", "enable_gqa"}:
        return False
    q: Any = call.args[0]
    own = _first(q)
    if own is None or written_late(call, q, (own,)):
        return False
    cuts = _cuts(call, 2, value(own).shape[2])
    if not cuts:
        return False
    made = Emitter(call, ctx)(SDPA, own, *call.args[1:], **call.kwargs)
    for cut in cuts:
        cut[-1].replace_all_uses_with(_again(made, cut[:-1], ctx))
    for node in dict.fromkeys(node for cut in cuts for node in reversed(cut)):
        if not node.users:
            node.graph.erase_node(node)
    if not call.users:
        call.graph.erase_node(call)
    ctx.note(module_path(made) or "attention", "rewritten", "queries that nobody reads left out")
    return True


def _first(q: Any) -> Node | None:
    """Return the first of two queries that are joined, whatever moved their axes together."""
    if not isinstance(q, Node) or value(q).dim() != 4 or not is_call(q, torch.cat):
        return None
    pieces, axis = q.args[0], q.args[1]
    if axis != 2 or not isinstance(pieces, (list, tuple)) or len(pieces) != 2:
        return None
    own = pieces[0]
    return own if isinstance(own, Node) else None


def _cuts(node: Node, axis: int, rows: Any) -> list[list[Node]] | None:
    """List the calls that cut an axis to its first rows, each behind those that move axes."""
    found: list[list[Node]] = []
    for user in node.users:
        if (axes := moved_axes(user)) is not None:
            behind = _cuts(user, axes.index(axis), rows)
            if behind is None:
                return None
            found += [[user, *cut] for cut in behind]
        elif _is_cut(user, axis, rows):
            found.append([user])
        else:
            return None
    return found


def _is_cut(node: Node, axis: int, rows: Any) -> bool:
    if not is_call(node, operator.getitem):
        return False
    index = node.args[1]
    parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    if len(parts) <= axis or not all(isinstance(part, slice) for part in parts):
        return False
    ends = parts[axis]
    first = ends.start in (None, 0) and ends.step in (None, 1) and ends.stop is not None
    others = all(part == _NOTHING for i, part in enumerate(parts) if i != axis)
    return first and others and known_true(value(node).shape[axis] == rows)


def _again(made: Node, moves: list[Node], ctx: PassContext) -> Node:
    """Move the axes of fewer rows as those of all rows were."""
    for move in moves:
        args = tuple(made if arg is move.all_input_nodes[0] else arg for arg in move.args)
        made = Emitter(move, ctx).like(move, args, dict(move.kwargs))
    return made
