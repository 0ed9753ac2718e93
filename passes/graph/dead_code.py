"""Erase calls that nobody reads, in a graph and in the graphs that it calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.fx import Graph, GraphModule

from lipass.passes.graph.ops import has_effect


def erase_dead(graph: Graph) -> bool:
    """Erase what has no effect and no reader; return whether anything was.

    `Graph.eliminate_dead_code` goes into subgraphs with a rule of its own, by which a body loses
    what it is called for: the ends of a `vmap`, a choice of kernels, draws.
    """
    graph.lint()
    changed = False
    for node in reversed(graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users and not has_effect(node):
            graph.erase_node(node)
            changed = True
    owner = graph.owning_module
    read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    for name, child in owner.named_children() if owner is not None else ():
        if name in read and isinstance(child, GraphModule) and erase_dead(child.graph):
            child.recompile()
            changed = True
    return changed


@contextlib.contextmanager
def dropped(graph: Graph) -> Iterator[None]:
    """Take away again what is inserted inside; a fact is about a graph and does not change it."""
    before = set(graph.nodes)
    yield
    for node in reversed(graph.nodes):
        if node not in before:
            graph.erase_node(node)
