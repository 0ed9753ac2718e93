"""Read the sizes that a graph knows as symbols from the arguments of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph

from lipass.passes.graph.compat import Size, symbols_of, value

Bindings = tuple[tuple[str, int], ...]


class ArgumentSizes:
    """Say for each symbol which argument it is, or the size of which axis of which argument."""

    def __init__(self, graph: Graph) -> None:
        found: dict[str, tuple[int, int | None]] = {}
        for n, node in enumerate(graph.find_nodes(op="placeholder")):
            given = value(node)
            if isinstance(given, torch.Tensor):
                for axis, size in enumerate(given.shape):
                    if symbols_of(size) == {str(size)}:
                        found.setdefault(str(size), (n, axis))
            elif isinstance(given, torch.SymInt) and symbols_of(given) == {str(given)}:
                found[str(given)] = (n, None)
        self._places = tuple(sorted(found.items()))

    def __call__(self, args: tuple[Any, ...]) -> Bindings:
        """Return the sizes of one call by symbol."""
        return tuple(
            [
                (name, int(args[n] if axis is None else args[n].shape[axis]))
                for name, (n, axis) in self._places
            ]
        )


def number(size: Size, known: dict[str, int]) -> int:
    """Compute a size of the graph for one call."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({one: known[str(one)] for one in expression.free_symbols}))
