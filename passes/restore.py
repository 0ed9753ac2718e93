"""Put a graph back to what it was in front of a pass that failed half-way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

_TABLES = ("_modules", "_parameters", "_buffers")
# Where Dynamo keeps what it knows of an input beside its metadata; AOTAutograd asks for it.
_SOURCE = "_dynamo_source"


@dataclass(frozen=True)
class _Saved:
    """Hold one node by reference: its arguments are immutable, its metadata is a dict of facts."""

    node: Node
    call: tuple[str, Any, Any, Any]
    name: str
    type: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class _SavedGraph:
    owner: GraphModule
    codegen: Any
    nodes: tuple[_Saved, ...]
    tables: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, owner: GraphModule) -> _SavedGraph:
        nodes = tuple(
            _Saved(n, (n.op, n.target, n.args, n.kwargs), n.name, n.type, dict(n.meta))
            for n in owner.graph.nodes
        )
        tables = {name: dict(getattr(owner, name)) for name in _TABLES}
        return cls(owner, owner.graph._codegen, nodes, tables)

    def restore(self) -> None:
        for name, table in self.tables.items():
            getattr(self.owner, name).clear()
            getattr(self.owner, name).update(table)
        graph, made = Graph(), dict[Node, Node]()
        graph.set_codegen(self.codegen)
        for saved in self.nodes:
            op, target, args, kwargs = saved.call
            args, kwargs = map_arg(args, made.__getitem__), map_arg(kwargs, made.__getitem__)
            node = graph.create_node(op, target, args, kwargs, saved.name, saved.type)
            node.meta = dict(saved.meta)
            if hasattr(saved.node, _SOURCE):
                setattr(node, _SOURCE, getattr(saved.node, _SOURCE))
            made[saved.node] = node
        self.owner.graph = graph


@dataclass(frozen=True)
class SavedModule:
    """Hold the graphs and submodules of a module.

    Guards on sizes that a failed pass has made are not taken back: torch has simplified sizes by
    them already. They hold for the call that is being compiled and cost at most a recompilation.
    """

    graphs: tuple[_SavedGraph, ...]

    @classmethod
    def of(cls, gm: GraphModule) -> SavedModule:
        """Save a module and the graphs that earlier passes outlined from it."""
        owners = [one for one in gm.modules() if isinstance(one, GraphModule)]
        return cls(tuple(_SavedGraph.of(one) for one in owners))

    def restore(self) -> None:
        """Give each module a graph that is equal to its saved one, facts included."""
        for saved in reversed(self.graphs):
            saved.restore()
