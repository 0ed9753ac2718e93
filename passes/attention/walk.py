"""Walk from queries and keys up to what they are made of."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

import torch
import torch.fx
from torch.fx import Node

from lipass.passes.attention.operators import is_attention
from lipass.passes.graph.compat import Size, known_true, value
from lipass.passes.graph.ops import is_copy


def same_values(node: Node) -> Node:
    """Walk up through copies and casts to the same dtype and shape."""
    while is_copy(node):
        node = node.all_input_nodes[0]
    return node


def upstream(node: Node, stops: Callable[[Node], bool] = is_attention) -> Iterator[Node]:
    """Iterate over what a node is computed from, nearest first, without crossing an attention.

    Args:
        node: where the walk begins.
        stops: says what is not crossed, if it is more than attention.
    """
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    heap, seen = [(-order[node], node.name)], {node.name}
    by_name = {n.name: n for n in order}
    while heap:
        current = by_name[heapq.heappop(heap)[1]]
        yield current
        if stops(current):
            continue
        for above in current.all_input_nodes:
            if above.name not in seen:
                seen.add(above.name)
                heapq.heappush(heap, (-order[above], above.name))


def shares_tokens(a: Node, b: Node, tokens: Size) -> bool:
    """Whether two tensors are computed from one computed tensor of that many tokens.

    Tokens are one axis `L` or neighbouring axes whose product is `L`, as in `[B, F, YX, C]`.
    """
    theirs = {n for n in upstream(b) if n.op not in ("placeholder", "get_attr")}
    return any(n in theirs and has_tokens(n, tokens) for n in upstream(a))


def has_tokens(node: Node, tokens: Size) -> bool:
    """Whether an axis of a tensor, or up to three neighbouring ones together, are the tokens."""
    tensor = value(node)
    if not isinstance(tensor, torch.Tensor):
        return False
    for start in range(tensor.dim()):
        product: Size = 1
        for size in tensor.shape[start : start + 3]:
            product = product * size
            if known_true(product == tokens):
                return True
    return False
