"""Read batched matrix products, in whichever spelling, as `[.., M, K] @ [.., K, N]`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from lipass.passes.graph.compat import value
from lipass.passes.graph.ops import moved_axes, name_of
from lipass.passes.graph.writes import mutates


@dataclass(frozen=True)
class View:
    """Name a tensor and the order of its axes that a reader wants: `node.permute(axes)`."""

    node: Node
    axes: tuple[int, ...]

    def source(self) -> View:
        """Walk up through calls that only move axes."""
        node, axes = self.node, self.axes
        while (moved := moved_axes(node)) is not None:
            axes = tuple(moved[axis] for axis in axes)
            node = operand(node, 0)
        return View(node, axes)

    def shape(self) -> list[Any]:
        """Return the sizes in the order of `axes`."""
        return [value(self.node).shape[axis] for axis in self.axes]


@dataclass(frozen=True)
class Product:
    """Hold `left @ right * scale`; its value is the product with the axes in order `out`."""

    node: Node
    left: View
    """`[.., M, K]`."""
    right: View
    """`[.., K, N]`."""
    out: tuple[int, ...]
    """`product.permute(out)` is the value of `node`."""
    scale: float = 1.0
    added: Node | None = None
    """What `baddbmm` adds to it, times `added_scale`."""
    added_scale: float = 1.0


def product(node: object) -> Product | None:
    """Read a node as a product of two tensors of one rank, or return None."""
    if not isinstance(node, Node):
        return None
    kind = name_of(node)
    if kind not in _READERS or mutates(node):
        return None
    return _READERS[kind](node)


def operand(node: Node, index: int) -> Any:
    """Return a tensor operand by position, whichever keyword it came by; None if it is missing."""
    if index < len(node.args):
        return node.args[index]
    names = (("input", "self", "batch1"), ("other", "mat2", "batch2"))
    found = [node.kwargs[key] for key in names[index] if key in node.kwargs]
    return found[0] if found else None


def ignored_input(node: Node) -> Node | None:
    """Return the tensor that a call takes and never reads, as `baddbmm` does with `beta=0`."""
    if name_of(node) == "baddbmm" and node.kwargs.get("beta", 1) == 0:
        given = operand(node, 0)
        return given if isinstance(given, Node) else None
    return None


def _plain(node: Node, left: Any, right: Any, scale: float = 1.0) -> Product | None:
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    ranks = [getattr(value(x), "ndim", 0) for x in (left, right)]
    if ranks[0] != ranks[1] or ranks[0] < 2:
        return None
    axes = tuple(range(ranks[0]))
    return Product(node, View(left, axes), View(right, axes), axes, scale)


def _matmul(node: Node) -> Product | None:
    return _plain(node, operand(node, 0), operand(node, 1))


def _baddbmm(node: Node) -> Product | None:
    names = ("batch1", "batch2")
    left, right = (
        node.args[i] if i < len(node.args) else node.kwargs.get(names[i - 1]) for i in (1, 2)
    )
    alpha = node.kwargs.get("alpha", 1)
    beta = node.kwargs.get("beta", 1)
    if not (isinstance(alpha, (int, float)) and isinstance(beta, (int, float))):
        return None
    found = _plain(node, left, right, float(alpha))
    added = operand(node, 0)
    if found is None or beta == 0 or not isinstance(added, Node):
        return found if beta == 0 else None
    return replace(found, added=added, added_scale=float(beta))


def _einsum(node: Node) -> Product | None:
    """Read `einsum` with one summed label, one free label of each operand and equal batches."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = [*operands[0]]
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    if "." in equation or any(len(set(x)) < len(x) for x in (left, right, out)):
        return None
    first, second = operands
    if not (isinstance(first, Node) and isinstance(second, Node)) or len(left) != len(right):
        return None
    batch = [label for label in out if label in left and label in right]
    summed = [label for label in left if label in right and label not in out]
    rows = [label for label in left if label not in right and label in out]
    columns = [label for label in right if label not in left and label in out]
    if [len(x) for x in (summed, rows, columns)] != [1, 1, 1] or len(batch) != len(left) - 2:
        return None
    order = batch + rows + columns
    return Product(
        node,
        View(first, tuple(left.index(x) for x in batch + rows + summed)),
        View(second, tuple(right.index(x) for x in batch + summed + columns)),
        tuple(order.index(x) for x in out),
    )


_READERS = {"matmul": _matmul, "bmm": _matmul, "baddbmm": _baddbmm, "einsum": _einsum}
