"""Find forms that Inductor is known to compute wrongly; what is found too much costs little."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.ops import is_copy, is_pointwise
from lipass.passes.graph.writes import memory_written, storage

_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "einsum", "baddbmm", "addmm"}
_SOFTMAXES = {"softmax", "_softmax", "_safe_softmax", "exp"}
_LAYERS = {"linear", "scaled_dot_product_attention", "conv2d", "conv3d", "layer_norm", "rms_norm"}
_WRITES = {"copy_", "setitem"}
_SLICES = {"narrow", "select", "unbind", "chunk", "split", "tensor_split"}
_SCATTERS = {
    *("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter"),
    *("index_copy", "index_put", "index_add", "index_fill", "index_reduce", "masked_scatter"),
    *("scatter", "scatter_add", "scatter_reduce", "put"),
}


def copies_of_written(graph: Graph) -> Iterator[Node]:
    """Find what may copy from memory that is written later, or at the same time from elsewhere."""
    last = _last_writes(graph)
    for i, node in enumerate(graph.nodes):
        if not last or not node.op.startswith("call") or name_of(node) in _PRODUCTS | _LAYERS:
            continue
        written = memory_written(node)
        for tensor in _tensors(node.all_input_nodes):
            at = storage(tensor)
            if at is None or at in written or last.get(at, -1) <= i:
                continue
            if written or _may_copy(tensor, value(node)):
                yield node
                break


def scatters_of_written(graph: Graph) -> Iterator[Node]:
    """Find what puts values into a new tensor made of memory that is written later."""
    last = _last_writes(graph)
    for i, node in enumerate(graph.nodes):
        if not last or not node.op.startswith("call") or name_of(node) not in _SCATTERS:
            continue
        first = node.args[0] if node.args else node.kwargs.get("input")
        at = storage(value(first))
        if at is not None and last.get(at, -1) > i:
            yield node


def rearranging_writes(graph: Graph) -> Iterator[Node]:
    """Find what writes to memory, in place, values of the same memory in another order."""
    for node in graph.nodes:
        if not node.op.startswith("call") or name_of(node) not in _WRITES:
            continue
        source, written = node.args[-1], memory_written(node)
        if isinstance(source, Node) and written and _is_reordered(source, written):
            yield node


def softmaxes_between_products(graph: Graph) -> Iterator[Node]:
    """Find what lies between two products as the softmax of attention does."""
    for node in graph.nodes:
        if not node.op.startswith("call") or name_of(node) not in _SOFTMAXES:
            continue
        if _meets_product(node, up=True) and _meets_product(node, up=False):
            yield node


def name_of(node: Node) -> str:
    """Return the name of what a node calls, without the overload of an operator."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return str(target if node.op == "call_method" else getattr(target, "__name__", target))


def _is_reordered(source: Node, memory: set[int]) -> bool:
    """Whether a path leads up to memory by way of a call that is neither pointwise nor a slice."""
    stack, seen = [(source, False)], {(source, False)}
    while stack:
        node, reordered = stack.pop()
        if storage(value(node)) in memory and (reordered or _reorders(node)):
            return True
        if not node.op.startswith("call") or name_of(node) in _PRODUCTS | _LAYERS:
            continue
        reordered = reordered or _reorders(node)
        for above in node.all_input_nodes:
            if (above, reordered) not in seen and isinstance(value(above), torch.Tensor):
                seen.add((above, reordered))
                stack.append((above, reordered))
    return False


def _reorders(node: Node) -> bool:
    if not node.op.startswith("call") or is_pointwise(node) or is_copy(node):
        return False
    if name_of(node) in _SLICES:
        return False
    index: Any = node.args[1] if name_of(node) == "getitem" else None
    parts = index if isinstance(index, tuple) else (index,)
    return index is None or any(isinstance(part, Node) and _is_tensor(part) for part in parts)


def _is_tensor(node: Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def _last_writes(graph: Graph) -> dict[int, int]:
    """Map memory to the position of the last node that writes to it."""
    return {at: i for i, node in enumerate(graph.nodes) for at in memory_written(node)}


def _may_copy(source: torch.Tensor, out: object) -> bool:
    """Whether a result may be a source as it is, in memory of its own."""
    for one in pytree.tree_leaves(out):
        if not isinstance(one, torch.Tensor) or storage(one) == storage(source):
            continue
        # a size that varies is equal to any other until it is proven not to be
        if one.dtype == source.dtype and not known_true(one.numel() != source.numel()):
            return True
    return False


def _tensors(nodes: list[Node]) -> Iterator[torch.Tensor]:
    found: list[Any] = []
    map_arg(nodes, lambda node: found.extend(pytree.tree_leaves(value(node))))
    return (one for one in found if isinstance(one, torch.Tensor))


def _meets_product(start: Node, *, up: bool) -> bool:
    """Whether a path of cheap calls leads from a node to a product."""
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        for other in node.all_input_nodes if up else node.users:
            if name_of(other) in _PRODUCTS:
                return True
            if name_of(other) in _LAYERS:
                continue
            if other not in seen and isinstance(value(other), torch.Tensor):
                seen.add(other)
                stack.append(other)
    return False
