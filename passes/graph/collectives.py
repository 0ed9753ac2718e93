"""Tell which calls exchange tensors with other processes: all of these make them, in one order."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lipass.passes.graph.primitives import bodies, overloads, trace

_NAMESPACES = {
    "_c10d_functional",
    "_c10d_functional_autograd",
    "_dtensor",
    "c10d",
    "c10d_functional",
    "symm_mem",
}
# What operators of libraries call the processes that take part.
_GROUPS = {"group", "group_name", "process_group"}


def is_collective(node: Node) -> bool:
    """Whether a call exchanges something with other processes, or waits for what does.

    Of an operator of a library it is taken to be so if it is told a group of processes.
    """
    inner = bodies(node)
    if any(is_collective(one) for body in inner for one in body.graph.nodes):
        return True
    if not node.op.startswith("call") or inner:
        return False
    target: Any = node.target
    if (getattr(target, "__module__", None) or "").startswith("torch.distributed"):
        return True
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(map(_exchanges, (getattr(target, one) for one in target.overloads())))
    if any(map(_exchanges, overloads(node))):
        return True
    found = trace(node)
    return found is not None and any(_exchanges(one.overload) for one in found.ran)


def _exchanges(overload: Any) -> bool:
    if overload.namespace in _NAMESPACES:
        return True
    if overload.namespace in ("aten", "prims", "prim", "lipass"):
        return False
    return any(one.name in _GROUPS for one in overload._schema.arguments)
