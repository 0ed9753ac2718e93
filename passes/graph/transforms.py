"""Know where calls are transformed (`torch.vmap`): a graph enters and leaves that by calls.

::

    %level = _vmap_increment_nesting(24, error);  %a = _add_batch_dim(%x, 0, 1)
    %b = softmax(%a, -1)
    %y = _remove_batch_dim(%b, 1, 24, 0);  %left = _vmap_decrement_nesting()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch.fx import Graph, Node

from lipass.passes.graph.compat import value
from lipass.passes.graph.ops import draws
from lipass.passes.graph.writes import memory_written, storage

_MODULES = ("torch._functorch", "torch._C._functorch")


class Transform(NamedTuple):
    """The calls at both ends of one transform."""

    enter: Node
    leave: Node

    def calls(self) -> list[Node]:
        """List the calls within, both ends included."""
        found, node = [], self.enter
        while node is not self.leave.next:
            found.append(node)
            node = node.next
        return found


def transforms(graph: Graph) -> Iterator[Transform]:
    """Iterate over the transforms of a graph, inner ones in front of those around them."""
    opened: list[Node] = []
    for node in graph.nodes:
        name = _name(node)
        if name.endswith("_increment_nesting"):
            opened.append(node)
        elif name.endswith("_decrement_nesting") and opened:
            yield Transform(opened.pop(), node)


def _name(node: Node) -> str:
    if node.op != "call_function":
        return ""
    module = getattr(node.target, "__module__", None) or ""
    return getattr(node.target, "__name__", "") if module.startswith(_MODULES) else ""


def half_transformed(nodes: Sequence[Node], own: set[Node]) -> str | None:
    """Say which transform holds for some nodes but is not entered and left among them, or None."""
    for enter, leave in transforms(nodes[0].graph):
        if enter in own and leave in own:
            continue
        if enter in own or leave in own:
            return f"%{enter.name} and %{leave.name} are the ends of one transform"
        if any(node in own for node in Transform(enter, leave).calls()):
            return f"%{enter.name} transforms what is computed around it"
    return None


def place_ends(graph: Graph) -> None:
    """Say of which module the calls are that leave a transform; Dynamo does not."""
    for enter, leave in transforms(graph):
        if not leave.meta.get("nn_module_stack") and enter.meta.get("nn_module_stack"):
            leave.meta["nn_module_stack"] = dict(enter.meta["nn_module_stack"])


def drop_unread(graph: Graph) -> bool:
    """Erase transforms of which nobody reads a value, such as those that build an unused mask."""
    changed = False
    for transform in list(transforms(graph)):
        calls = transform.calls()
        if _is_unread(calls):
            for node in reversed(calls):
                graph.erase_node(node)
            changed = True
    return changed


def _is_unread(calls: list[Node]) -> bool:
    own = set(calls)
    above = {one for node in calls for one in node.all_input_nodes} - own
    given = {storage(value(one)) for one in above} - {None}
    for node in calls:
        if draws(node) or memory_written(node) & given:
            return False
        if any(user not in own for user in node.users):
            return False
    return True
