"""Follow what stands between the two products of an attention written by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from lipass.passes.attention.products import Product, operand, product
from lipass.passes.attention.score_mask import Mask, bias_of, read_bias, read_fill
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.ops import (
    argument,
    draws,
    is_activation,
    is_cast,
    is_learned,
    is_mask,
    name_of,
    reads,
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
    masks: list[Mask] = field(default_factory=list)
    """What hides keys or adds to their scores, from the softmax up."""

    def refuse(self, why: str) -> None:
        """Note why this is no plain attention, unless there is a reason already."""
        self.why = self.why or why

    def note_mask(self, mask: Mask | str) -> None:
        """Keep a mask, or why it is none that attention takes."""
        if isinstance(mask, str):
            self.refuse(mask)
        else:
            self.masks.append(mask)

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
        if others := [one for one in node.users if one is not below and _needs(one, node)]:
            chain.refuse(_other_use(node, others, what))
        if found is not None:
            if found.added is not None:
                factor = chain.scale * found.added_scale
                chain.note_mask(bias_of(found.added, factor, found.node))
            if found.out != tuple(range(len(found.out))):
                chain.refuse(f"its scores change their axes in %{node.name}")
            return found
        below, node = node, _step(node, chain)
    return None


def _needs(user: Node, node: Node) -> bool:
    """Whether a node needs the numbers of another one, and not only its shape or dtype."""
    return not user.op.startswith("call") or mutates(user) or node in reads(user)


def _other_use(node: Node, users: list[Node], what: str) -> str:
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
    elif kind in ("add", "sub", "where", "masked_fill") and chain.softmax and not mutates(node):
        _note_mask(node, above, kind, chain)
    elif kind in ("add", "sub", "baddbmm"):
        chain.refuse(f"%{node.name} adds to its {what}")
    elif is_mask(node):
        chain.refuse(f"%{node.name} masks its {what}")
    elif is_activation(node) and chain.softmax is None:
        chain.activation = chain.activation or node
    else:
        chain.refuse(f"%{node.name} changes its {what}")
    return above


def _note_mask(node: Node, above: Node, kind: str, chain: Chain) -> None:
    pairs = zip(value(node).shape, value(above).shape, strict=True)
    if not all(known_true(a == b) for a, b in pairs):
        chain.refuse(f"%{node.name} changes its scores")
    read = read_fill if kind in ("where", "masked_fill") else read_bias
    chain.note_mask(read(node, above, chain.scale))


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
    found: list[Node] = []
    for arg in (operand(node, 0), *node.all_input_nodes):
        tensor = value(arg)
        if not (isinstance(arg, Node) and isinstance(tensor, torch.Tensor)):
            continue
        pairs = zip(tensor.shape[:-1], rows, strict=False)
        has_rows = tensor.dim() == len(rows) + 1 and all(known_true(a == b) for a, b in pairs)
        if has_rows and tensor.is_floating_point() and arg not in found:
            found.append(arg)
    # of scores and a bias of their shape, the scores are those that come from a product
    return next((one for one in found if len(found) > 1 and _from_product(one)), (*found, None)[0])


def _from_product(node: Node) -> bool:
    if product(node) is not None:
        return True
    above = _tensor(node)
    return above is not None and above in reads(node) and _from_product(above)
