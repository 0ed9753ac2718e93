"""Choose what is worth computing once: calls that compute, and the views that only they read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from lipass.passes.graph.compat import value
from lipass.passes.graph.ops import is_view


def worth_once(nodes: Sequence[Node]) -> list[Node]:
    """Drop the views that nothing is computed from, and whatever only they would need.

    Args:
        nodes: calls that could be made once, in order.
    """
    computed: set[Node] = set()
    for node in nodes:
        above = any(one in computed for one in node.all_input_nodes)
        if above or (not is_view(node) and isinstance(value(node), torch.Tensor)):
            computed.add(node)
    # A view that a chosen computation reads goes with it.
    needed = set(computed)
    for node in reversed(nodes):
        if any(user in needed for user in node.users):
            needed.add(node)
    return [node for node in nodes if node in needed]
