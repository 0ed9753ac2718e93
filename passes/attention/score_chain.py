"""Follow what stands between the two products of an attention written by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from lipass.passes.attention.products import Product, operand, product
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.ops import (
    argument,
    draws,
    is_activation,
    is_cast,
    is_learned,
    is_mask,
    name_of,
)
from lipass.passes.graph.writes import mutates


@dataclass
class Chain:
    """What stands between the two products, from the weights up to the scores."""

    scale: float = 1.0
    softmax: Node | None = None
    activation: Node | None = None
    why: str = ""
    """The first thing that plain attention does not do."""
    narrow: torch.dtype | None = None
    """Dtype in which softmax runs."""

    def refuse(self, why: str) -> None:
        """Note why this is no plain attention, unless there is a reason already."""
        self.why = self.why or why

    def no_softmax(self) -> str:
        """Say what makes the weights in place of softmax, or nothing."""
        if self.softmax is not None or self.activation is None:
            return ""
        return f"its weights come from {name_of(self.activation)}, not from softmax"


def scores(weights: Node, below: Node, chain: Chain) -> Product | None:
    """Walk from the weights up to the product of q and k, noting what is in between."""
    node: Node | None = weights
    while node is not None:
        found = product(node)
        what = "scores" if found or chain.softmax else "weights"
        if len(node.users) > 1:
            chain.refuse(_other_use(node, below, what))
        if found is not None:
            if found.out != tuple(range(len(found.out))):
                chain.refuse(f"its scores change their axes in %{node.name}")
            return found
        below, node = node, _step(node, chain)
    return None


def _other_use(node: Node, below: Node, what: str) -> str:
    users = [user for user in node.users if user is not below]
    if writes := [u for u in users if mutates(u)]:
        return f"%{writes[0].name} writes to its {what} in place"
    if any(u.op == "output" for u in users):
        return f"its {what} are returned"
    last = users[-1]
    return f"its {what} are used by %{last.name} too"


def _step(node: Node, chain: Chain) -> Node | None:
    """Note what one node does to the weights or the scores, and return the node above it."""
    kind = name_of(node)
    above = _tensor(node)
    what = "scores" if chain.softmax else "weights"
    if node.op not in ("call_function", "call_method") or above is None:
        return None
    if mutates(node):
        chain.refuse(f"%{node.name} writes to its {what} in place")
    if kind == "softmax":
        if chain.softmax is not None:
            chain.refuse("its softmax is applied twice")
        if chain.activation is not None:
            chain.refuse(f"%{chain.activation.name} changes its weights")
        chain.softmax = chain.softmax or node
        rank, axis = value(node).dim(), argument(node, 1, "dim")
        if not isinstance(axis, int) or axis % rank != rank - 1:
            chain.refuse(f"its softmax is over axis {axis} of {rank}, not over the keys")
        chain.narrow = value(node).dtype
    elif is_cast(node):
        pass  # as dropout is where it is off
    elif draws(node):
        rate = argument(node, 1, "p", 0.5)
        chain.refuse(f"dropout is {rate}" if "dropout" in kind else _drawn(node, what))
    elif kind in ("mul", "div"):
        _note_scale(node, above, what, chain)
    elif kind in ("add", "sub", "baddbmm"):
        chain.refuse(f"%{node.name} adds to its {what}")
    elif is_mask(node):
        chain.refuse(f"%{node.name} masks its {what}")
    elif is_activation(node) and chain.softmax is None:
        chain.activation = chain.activation or node
    else:
        chain.refuse(f"%{node.name} changes its {what}")
    return above


def _drawn(node: Node, what: str) -> str:
    return f"%{node.name} draws random numbers for its {what}"


def _note_scale(node: Node, above: Node, what: str, chain: Chain) -> None:
    others = [arg for arg in (*node.args, *node.kwargs.values()) if arg is not above]
    factor = others[0] if others else None
    divides = name_of(node) == "div"
    if isinstance(factor, Node) and len(others) == 1:
        chain.refuse(f"%{factor.name} scales its {what} and is no constant")
    elif (
        len(others) != 1
        or not isinstance(factor, (int, float))
        or (divides and operand(node, 0) is not above)
    ):
        chain.refuse(f"%{node.name} changes its {what}")
    elif chain.softmax is None:
        chain.refuse(f"%{node.name} scales its weights behind the softmax")
    elif divides and factor == 0:
        chain.refuse("its scale is infinite")
    else:
        chain.scale = chain.scale / factor if divides else chain.scale * factor


def _tensor(node: Node) -> Node | None:
    """Return the operand that a node changes: the first of floats with as many rows."""
    if is_learned(node) or not isinstance(value(node), torch.Tensor):
        return None
    rows = value(node).shape[:-1]
    for arg in (operand(node, 0), *node.all_input_nodes):
        tensor = value(arg)
        if not (isinstance(arg, Node) and isinstance(tensor, torch.Tensor)):
            continue
        pairs = zip(tensor.shape[:-1], rows, strict=False)
        has_rows = tensor.dim() == len(rows) + 1 and all(known_true(a == b) for a, b in pairs)
        if has_rows and tensor.is_floating_point():
            return arg
    return None
