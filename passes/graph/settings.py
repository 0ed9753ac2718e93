"""Know what a graph sets for the calls behind: the kernel of attention, precision, default dtypes.

`sdpa_kernel`, deterministic algorithms, the precision of products and the like are calls of their
own that give nothing. They hold until they are called again::

    %_sdpa_kernel = _sdpa_kernel([MATH], False)
    %o = scaled_dot_product_attention(%q, %k, %v)         in the setting
    %_sdpa_kernel_1 = _sdpa_kernel([all of them], False)  put back by the end of the `with`
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from lipass.passes.graph.compat import choose_kernel
from lipass.passes.graph.ops import gives_nothing
from lipass.passes.graph.writes import mutates


def is_setting(node: Node) -> bool:
    """Whether a call sets something for the calls behind; autocast and gradients are not meant."""
    if node.op != "call_function" or node.users or not gives_nothing(node):
        return False
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return False
    module = getattr(node.target, "__module__", None) or ""
    elsewhere = node.target in _NOT_MEANT or module.startswith(_SCOPES)
    return not elsewhere and not mutates(node)


# Autocast is followed in `modes`; gradients and transforms change no number that is computed.
_NOT_MEANT = {_enter_autocast, _exit_autocast, torch._C._set_grad_enabled}
_SCOPES = ("torch._functorch", "torch._C._functorch", "torch.autograd", "torch._C._autograd")


class Settings:
    """Follow what is set while walking over a graph."""

    def __init__(self, graph: Graph) -> None:
        self._set: dict[Any, tuple[Node, object]] = {}
        last = graph.find_nodes(op="call_function", target=choose_kernel) if choose_kernel else []
        # Only a `with` calls this; its end puts back what held in front of the graph.
        self._at_first = {choose_kernel: _form(last[-1])} if last else {}

    def follow(self, node: Node) -> None:
        """Go behind the next node."""
        if is_setting(node):
            self._set[node.target] = (node, _form(node))

    def held(self) -> Iterator[Node]:
        """Iterate over the calls whose settings hold and did not hold in front of the graph."""
        for target, (node, form) in self._set.items():
            if form != self._at_first.get(target):
                yield node


def scopes(graph: Graph) -> Iterator[tuple[Node, Node]]:
    """Iterate over the pairs of calls at both ends of `with sdpa_kernel(..)`."""
    calls = graph.find_nodes(op="call_function", target=choose_kernel) if choose_kernel else []
    if not calls:
        return
    now = _form(calls[-1])
    opened: list[tuple[Node, object]] = []
    for call in calls:
        form = _form(call)
        if opened and form == opened[-1][1]:
            yield opened.pop()[0], call
        else:
            opened.append((call, now))
        now = form


def _form(node: Node) -> object:
    """Return what a setting is set to, whatever the nodes are called that name it."""

    def whole(part: Any) -> Any:
        return (part.target, map_aggregate(part.args, whole)) if isinstance(part, Node) else part

    return str(map_aggregate((node.args, dict(node.kwargs)), whole))


def chosen_kernel(node: Node) -> str | None:
    """Say that a call of attention runs in the kernel that the user chose, or None."""
    graph = node.graph
    if choose_kernel is None or not graph.find_nodes(op="call_function", target=choose_kernel):
        return None
    settings = Settings(graph)
    for one in graph.nodes:
        if one is node:
            break
        settings.follow(one)
    return next((_CHOSEN for one in settings.held() if one.target is choose_kernel), None)


_CHOSEN = "the user chose the kernel with sdpa_kernel; attention outside of it can be rewritten"
