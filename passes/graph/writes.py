"""Tell which nodes write, and to which memory."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch.fx import Node
from torch.fx.node import map_arg

from lipass.passes.graph.compat import value, without_vmap

_WRITES = {
    operator.setitem,
    *(getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv")),
    *(getattr(operator, f"i{name}") for name in ("mod", "pow", "matmul", "and", "or", "xor")),
}


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


def _lies_in(node: Node, memory: int) -> bool:
    """Whether a node, or a tensor of a tuple such as `unbind` gives, lies in some memory."""
    return any(storage(one) == memory for one in pytree.tree_leaves(value(node)))


def storage(tensor: object) -> int | None:
    """Return an identity of the memory of a fake tensor; None for what is no tensor."""
    tensor = without_vmap(tensor)
    return tensor.untyped_storage()._cdata if isinstance(tensor, torch.Tensor) else None


def has_effect(node: Node) -> bool:
    """Whether a node does something even if nobody reads its value, such as entering a vmap."""
    module = getattr(node.target, "__module__", None) or ""
    return node.is_impure() or mutates(node) or module.startswith("torch._functorch")


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
    """Return the arguments that a node writes to."""
    if node.op == "call_method":
        return [node.args[0]] if _named_in_place(str(node.target)) else []
    if node.op != "call_function":
        return []
    if getattr(node.target, "__module__", "") == "_operator":
        writes = node.target in _WRITES and isinstance(value(node.args[0]), torch.Tensor)
        return [node.args[0]] if writes else []
    if node.kwargs.get("out") is not None:
        return [node.kwargs["out"]]
    if _argument(node, "inplace") is True:
        return [node.args[0]]
    schemas = _schemas(node.target)
    if schemas:
        found = [one for schema in schemas for one in _written_by_schema(node, schema)]
        # What is said to write, but not where, may write anywhere.
        anywhere = [node.all_input_nodes] if any(s.is_mutable for s in schemas) else []
        return found or anywhere
    return [node.args[0]] if _named_in_place(getattr(node.target, "__name__", "")) else []


def _argument(node: Node, name: str) -> Any:
    """Return an argument of a Python function, whether it came by keyword or by position."""
    at = _position(node.target, name)
    return node.args[at] if at is not None and at < len(node.args) else node.kwargs.get(name)


@functools.lru_cache(maxsize=512)
def _position(target: Any, name: str) -> int | None:
    if not inspect.isfunction(target):
        return None
    parameters = list(inspect.signature(target).parameters)
    return parameters.index(name) if name in parameters else None


def _schemas(target: Any) -> list[Any]:
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, name)._schema for name in target.overloads()]
    schema = getattr(target, "_schema", None)
    return [] if schema is None else [schema]


def _written_by_schema(node: Node, schema: Any) -> Iterator[Any]:
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            if given is not None:
                yield given


def _named_in_place(name: str) -> bool:
    return name.endswith("_") and (not name.startswith("_") or name.startswith("_foreach_"))
