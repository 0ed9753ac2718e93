"""Know what autocast a call is made in: a graph enters and leaves it by calls of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Node


def entered(node: Node) -> list[Node]:
    """List the calls that enter an autocast in front of a node which is not left there yet."""
    graph = node.graph
    if not graph.find_nodes(op="call_function", target=_enter_autocast):
        return []
    active: list[Node] = []
    for one in graph.nodes:
        if one is node:
            break
        follow(active, one)
    return active


def follow(active: list[Node], node: Node) -> None:
    """Bring a list of entered autocasts behind the next node."""
    if node.target is _enter_autocast:
        active.append(node)
    elif node.target is _exit_autocast:
        active[:] = [one for one in active if one is not node.args[0]]


@contextlib.contextmanager
def inside(active: Iterable[Node]) -> Iterator[None]:
    """Compute as in entered autocasts, outermost first."""
    with contextlib.ExitStack() as stack:
        for node in active:
            given: Any = node.args
            device, dtype, enabled, _ = given
            # A cache would hold fake weights beyond this graph.
            stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
        yield


def half_inside(nodes: Sequence[Node]) -> str | None:
    """Say which autocast holds for some nodes but is not entered and left among them, or None.

    What is outlined runs in the autocasts that are called within it, and in no other.
    """
    graph, own = nodes[0].graph, set(nodes)
    if not graph.find_nodes(op="call_function", target=_enter_autocast):
        return None
    active: list[Node] = []
    for node in graph.nodes:
        if node in own and (around := [one for one in active if one not in own]):
            return f"%{around[-1].name} switches autocast on around %{node.name}"
        if node in own and node.target is _exit_autocast and node.args[0] not in own:
            return f"%{node.name} leaves an autocast that it did not enter"
        follow(active, node)
        if node is nodes[-1]:
            break
    return f"%{active[-1].name} enters an autocast that it does not leave" if active else None
