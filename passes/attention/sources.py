"""Tell where keys come from: an input that holds them, a cache, or a projection in the graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lipass.passes.attention import token_grid
from lipass.passes.attention.cameras import is_matrices
from lipass.passes.attention.match import Refusal
from lipass.passes.attention.site import SDPA
from lipass.passes.attention.walk import has_tokens, shares_tokens, upstream
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import Size, has_hint, hint, is_parameter, known_true, value
from lipass.passes.graph.writes import writers_of

_PROJECTIONS = {
    "linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "__matmul__", "einsum", "tensordot",
    "conv1d", "conv2d", "conv3d", "embedding", "multi_head_attention_forward",
    "scaled_dot_product_attention", "flex_attention",
}  # fmt: skip
_PARTS = {
    "narrow", "select", "index_select", "gather", "take_along_dim", "chunk", "split", "unbind",
    "tensor_split", "expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile",
    "roll", "unfold", "as_strided", "slice_scatter", "select_scatter", "index_copy", "index_put",
    "scatter", "where", "masked_select",
}  # fmt: skip
"""Calls whose result is not a whole tensor as it came."""
_SCATTERS = {"slice_scatter", "select_scatter", "index_copy", "index_put", "scatter"}


@dataclass(frozen=True)
class Source:
    """Say what keys are before anything but views, casts and pointwise calls is done to them."""

    made_by: Node | None
    """The call that projects them; None where the graph gets them as keys."""
    inputs: tuple[Node, ...] = ()
    """Inputs that hold them, where none projects them."""
    parts: tuple[Node, ...] = ()
    """Calls that take part of such an input, write to a copy of it or repeat it, nearest first."""

    @property
    def is_given(self) -> bool:
        """Whether the graph gets keys, as those of a cache, and does not make them."""
        return self.made_by is None and bool(self.inputs)


def source_of(key: Node) -> Source:
    """Walk up from keys to what makes them."""
    inputs: list[Node] = []
    parts: list[Node] = []
    todo, seen = [key], {key}
    while todo:
        node = todo.pop()
        if _is_made(node):
            return Source(node)
        if node.op in ("placeholder", "get_attr"):
            inputs.append(node)
            continue
        parts += [node] if _is_part(node) else []
        for above in _carriers(node):
            if above not in seen:
                seen.add(above)
                todo.append(above)
    return Source(None, tuple(inputs), tuple(parts))


def is_cache(key: Node) -> bool:
    """Whether keys are read from an input that the graph writes to, in place or in a copy."""
    source = source_of(key)
    if not source.is_given:
        return False
    scattered = any(_name(part) in _SCATTERS for part in source.parts)
    return scattered or any(writers_of(node) for node in source.inputs)


def why_not_apart(q: Node, key: Node, tokens: Size) -> str:
    """Say why keys may be of the tokens of q, or of a cache of earlier ones; nothing if neither.

    Keys come from another source if the graph makes them from inputs that the tokens of q are not
    made from, or gets them as one whole input that nobody writes to.
    """
    beneath = _beneath(key)
    for node in beneath:
        if node.op in ("placeholder", "get_attr") and (writes := writers_of(node)):
            return f"its keys are read from %{node.name}, which %{writes[-1].name} writes to"
    for node in upstream(q):
        if node in beneath and _holds_tokens(node, tokens):
            return f"its keys are made from %{node.name}, as q is, but are not the tokens of q"
    source = source_of(key)
    if source.parts and source.is_given:
        names = ", ".join(f"%{node.name}" for node in source.inputs)
        return f"its keys are part of {names}, as those of a cache are (%{source.parts[0].name})"
    return ""


def joined_with_others(q: Node, key: Node, tokens: Size) -> str:
    """Say that keys hold more than tokens of q, joined along heads or batch, or nothing."""
    todo, seen = [key], {key}
    while todo:
        node = todo.pop()
        if _is_made(node) or node.op in ("placeholder", "get_attr"):
            continue
        above = _carriers(node)
        for one in above if is_call(node, torch.cat) else ():
            if has_tokens(one, tokens) and not shares_tokens(q, one, tokens):
                return f"%{node.name} joins its keys with %{one.name}, which is not made from q's"
        todo += [one for one in above if one not in seen]
        seen.update(above)
    return ""


def _beneath(key: Node) -> set[Node]:
    """Collect what keys are computed from, by what was written to it too, up to an attention."""
    found, todo = {key}, [key]
    while todo:
        node = todo.pop()
        if is_call(node, SDPA):
            continue
        written = [one for write in writers_of(node) for one in write.all_input_nodes]
        above = {*node.all_input_nodes, *written} - found
        found |= above
        todo += above
    return found


def _holds_tokens(node: Node, tokens: Size) -> bool:
    """Whether a node holds the tokens of q, or is an input that they are made from."""
    if node.op not in ("placeholder", "get_attr"):
        return has_tokens(node, tokens)
    if is_parameter(node) or not isinstance(value(node), torch.Tensor) or is_matrices(node):
        return False
    return value(node).dim() > 3 or (value(node).dim() == 3 and has_tokens(node, tokens))


def is_of_latents(key: Node, per_latent: tuple[Size, Size]) -> bool:
    """Whether a reshape upstream of keys shows that they are a latent grid of this `(Y, X)`."""
    grid = token_grid.infer(key, value(key).shape[2])
    if isinstance(grid, Refusal):
        return False
    return all(known_true(a == b) for a, b in zip(grid[1:], per_latent, strict=True))


def _name(node: Node) -> str:
    """Return the name of a function, method or operator, whichever overload it is."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _is_made(node: Node) -> bool:
    if node.op == "call_module" or isinstance(value(node), torch.nn.Parameter):
        return True
    name = _name(node) if node.op.startswith("call") else ""
    if name in _PROJECTIONS or name.startswith("new_") or name.endswith("_like"):
        return True
    target = node.target
    # what an operator of a library does is not known; it may be a projection
    if isinstance(target, torch._ops.OpOverloadPacket):
        return not target._qualified_op_name.startswith(("aten::", "prims::"))
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims")


def _is_part(node: Node) -> bool:
    if _name(node) in _PARTS:
        return True
    if node.target is not operator.getitem or not isinstance(value(node.args[0]), torch.Tensor):
        return False
    index: Any = node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    return any(part not in (None, Ellipsis) and part != slice(None) for part in parts)


def _carriers(node: Node) -> list[Node]:
    """Return the operands that hold the keys; tables of positions, say, are smaller."""
    tensors = [n for n in node.all_input_nodes if _numel(value(n))]
    sizes = {n: _numel(value(n)) for n in tensors}
    largest = max(sizes.values(), default=0)
    joins = _name(node) in ("cat", "concat", "concatenate", "stack")
    return tensors if joins else [n for n in tensors if sizes[n] == largest]


def _numel(tensor: object) -> int:
    parts = tensor if isinstance(tensor, (tuple, list)) else (tensor,)
    sizes = [one.numel() for one in parts if isinstance(one, torch.Tensor)]
    return sum(1 + hint(size) for size in sizes if has_hint(size))
