"""Tell which nodes write, and to which memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch.fx import Node
from torch.fx.node import map_arg

from lipass.passes.graph.compat import value, without_vmap
from lipass.passes.graph.primitives import (
    IN_PLACE,
    bodies,
    by_name,
    overloads,
    trace,
    written_arguments,
)


def writes_between(first: Node, last: Node) -> Iterator[Node]:
    """Iterate over the nodes behind `first` and in front of `last` that write to an input."""
    node = first.next
    while node is not last and node.op != "output":
        if mutates(node):
            yield node
        node = node.next


def writers_of(node: Node) -> list[Node]:
    """List the nodes that write to the memory of a tensor or of its views, in order."""
    memory = storage(value(node))
    if memory is None:
        return []
    base, above = node, [node]
    while above:
        base = above[0]
        above = [one for one in base.all_input_nodes if _lies_in(one, memory)]
    found: set[Node] = set()
    views, seen = [base], {base}
    while views:
        for user in views.pop().users:
            if memory in memory_written(user):
                found.add(user)
            if user not in seen and _lies_in(user, memory):
                seen.add(user)
                views.append(user)
    return sorted(found)


def is_rewritten(node: Node) -> bool:
    """Whether anything writes to what a call made; memory of a view is asked of its source."""
    if any(shares_memory(node, one) for one in node.all_input_nodes):
        return False
    return bool(writers_of(node))


def _lies_in(node: Node, memory: int) -> bool:
    """Whether a node, or a tensor of a tuple such as `unbind` gives, lies in some memory."""
    return any(storage(one) == memory for one in pytree.tree_leaves(value(node)))


def shares_memory(node: Node, other: Node) -> bool:
    """Whether two tensors lie in one memory."""
    memory = storage(value(node))
    return memory is not None and storage(value(other)) == memory


def storage(tensor: object) -> int | None:
    """Return an identity of the memory of a fake tensor; None for what is no tensor."""
    tensor = without_vmap(tensor)
    return tensor.untyped_storage()._cdata if isinstance(tensor, torch.Tensor) else None


def mutates(node: Node) -> bool:
    """Whether a node writes to one of its inputs."""
    return bool(_written(node))


def memory_written(node: Node) -> set[int]:
    """Return the identities of the memory that a node writes to; see `storage`."""
    tensors: list[object] = []
    for argument in _written(node):
        map_arg(argument, lambda one: tensors.extend(pytree.tree_leaves(value(one))))
    return {at for tensor in tensors if (at := storage(tensor)) is not None}


def _written(node: Node) -> list[Any]:
    """Return the arguments that a call writes to."""
    if not node.op.startswith("call"):
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator) and not bodies(node):
        # a kernel of Triton, say, of which no schema and no body tells what it writes to
        return [list(node.all_input_nodes)]
    found = _written_in_bodies(node)
    traced = trace(node)
    if traced is not None:
        above = node.all_input_nodes
        return found + [above[at] for at in sorted(traced.written)]
    if node.target in IN_PLACE:
        return [node.args[0]] if isinstance(value(node.args[0]), torch.Tensor) else []
    known = overloads(node)
    for overload in known:
        named = by_name(overload, node.args, node.kwargs)
        given = [named[key] for key in sorted(written_arguments(overload, named))]
        found += [one for one in given if one is not None]
    # What is said to write, but not where, may write anywhere.
    anywhere = any(one._schema.is_mutable for one in known) and not found
    return [list(node.all_input_nodes)] if anywhere else found


def _written_in_bodies(node: Node) -> list[Any]:
    """Return everything that a call is given if a body writes to anything that it is given."""
    for body in bodies(node):
        given = {storage(value(one)) for one in body.graph.find_nodes(op="placeholder")} - {None}
        if any(memory_written(one) & given for one in body.graph.nodes):
            return [list(node.all_input_nodes)]
    return []
