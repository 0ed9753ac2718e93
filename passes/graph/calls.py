"""Recognise a call."""

from __future__ import annotations

from torch.fx import Node


def is_call(node: object, target: object) -> bool:
    """Whether a node calls a function, or a method if `target` is a string."""
    op = "call_method" if isinstance(target, str) else "call_function"
    return isinstance(node, Node) and node.op == op and node.target == target
