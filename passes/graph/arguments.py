"""Read and write the arguments of an operator's call by the names of its schema."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

Spelled = tuple[tuple[Any, ...], dict[str, Any]]


def arguments(node: Node) -> dict[str, Any]:
    """Return every argument of a call of an operator by its name, defaults included."""
    schema = _overload(node)._schema.arguments
    defaults = {one.name: one.default_value for one in schema if one.has_default_value()}
    names = [one.name for one in schema]
    return defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def spelled(operator: torch._ops.OpOverload, given: dict[str, Any]) -> Spelled:
    """Put named arguments in the order of an operator; keywords at their default are left out."""
    args, kwargs = [], {}
    for one in operator._schema.arguments:
        if not one.kwarg_only:
            args.append(given[one.name])
        elif not one.has_default_value() or given[one.name] != one.default_value:
            kwargs[one.name] = given[one.name]
    return tuple(args), kwargs


def set_arguments(node: Node, **changes: Any) -> None:
    """Change arguments of a call of an operator."""
    node.args, node.kwargs = spelled(_overload(node), arguments(node) | changes)


def overload_of(target: object) -> torch._ops.OpOverload | None:
    """Return the overload that a call of an operator means; Dynamo writes some without."""
    if isinstance(target, torch._ops.OpOverloadPacket) and target.overloads() == ["default"]:
        target = target.default
    return target if isinstance(target, torch._ops.OpOverload) else None


def _overload(node: Node) -> torch._ops.OpOverload:
    found = overload_of(node.target)
    assert found is not None, node.target
    return found
