"""Know in what autocast and settings calls are made: a graph enters and leaves them by calls."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, Node

from lipass.passes.graph.ops import gives_nothing
from lipass.passes.graph.settings import Settings, is_setting, scopes
from lipass.passes.graph.transforms import half_transformed, place_ends
from lipass.passes.graph.writes import mutates


def place_switches(graph: Graph) -> None:
    """Say of which module the calls are that enter and leave something; Dynamo does not.

    An autocast, or a choice of kernels, belongs to the innermost module that the calls on both
    sides of its beginning, or of its end, are made in, if all calls within it are.
    """
    place_ends(graph)
    for enter, leave in (*_autocasts(graph), *scopes(graph)):
        within = _calls(enter.next, leave)
        sides = [_shared_stack(_beside(switch)) for switch in (enter, leave)]
        for stack in sorted(sides, key=len, reverse=True):
            if len(_shared_stack([*within, stack])) == len(stack):
                for switch in (enter, leave):
                    # the calls that only name what is set come with it
                    for one in (switch, *switch.all_input_nodes):
                        if not _is_call(one) and one.op.startswith("call"):
                            one.meta["nn_module_stack"] = dict(stack)
                break


def _autocasts(graph: Graph) -> Iterator[tuple[Node, Node]]:
    for leave in graph.find_nodes(op="call_function", target=_exit_autocast):
        enter = leave.args[0]
        assert isinstance(enter, Node)
        yield enter, leave


_Stack = list[tuple[Any, Any]]


def _calls(first: Node, end: Node) -> list[_Stack]:
    """Return the modules of the calls from one node up to another."""
    found, node = [], first
    while node is not end:
        if _is_call(node):
            found.append(_stack(node))
        node = node.next
    return found


def _beside(switch: Node) -> list[_Stack]:
    """Return the modules of the calls nearest to a switch, in front and behind."""
    before, behind = switch.prev, switch.next
    while before.op != "root" and not _is_call(before):
        before = before.prev
    while behind.op != "root" and not _is_call(behind):
        behind = behind.next
    return [_stack(before), _stack(behind)]


def _is_call(node: Node) -> bool:
    return node.op.startswith("call") and (not gives_nothing(node) or mutates(node))


def _stack(node: Node) -> _Stack:
    return list((node.meta.get("nn_module_stack") or {}).items())


def _shared_stack(stacks: list[_Stack]) -> _Stack:
    """Return the modules that begin all of some stacks."""
    columns = zip(*stacks, strict=False)
    same = itertools.takewhile(lambda column: all(one == column[0] for one in column), columns)
    return [column[0] for column in same]


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


def _half_set(nodes: Sequence[Node], own: set[Node]) -> str | None:
    if not any(map(is_setting, nodes[0].graph.nodes)):
        return None
    settings = Settings(nodes[0].graph)
    for node in nodes[0].graph.nodes:
        held = [one for one in settings.held() if one not in own] if node in own else []
        if held:
            return f"%{held[0].name} sets something for %{node.name}"
        settings.follow(node)
        if node is nodes[-1]:
            break
    left = next(settings.held(), None)
    return f"%{left.name} sets something that is not put back" if left is not None else None


def half_inside(nodes: Sequence[Node]) -> str | None:
    """Say what holds for some nodes but is not entered and left among them, or None.

    What is outlined runs in the autocasts, settings and transforms that are called within it, and
    in no other.
    """
    graph, own = nodes[0].graph, set(nodes)
    if why := half_transformed(nodes, own) or _half_set(nodes, own):
        return why
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
