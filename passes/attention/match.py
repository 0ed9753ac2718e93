"""Recognise nodes in canonical form, or say in a `Refusal` why they are something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.fx
from torch.fx import Node

from lipass.passes.attention.operators import argument, places_of
from lipass.passes.attention.padding_mask import same_for_all
from lipass.passes.attention.site import SDPA
from lipass.passes.attention.walk import same_values
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import Size, constant, guard, known_true, value
from lipass.passes.graph.writes import memory_written, storage, writes_between


@dataclass(frozen=True)
class Refusal:
    """Say why a matcher does not match."""

    reason: str


@dataclass(frozen=True)
class Operands:
    """Hold the operands of an attention call; `keys[i]` and `values[i]` are one segment."""

    q: Node
    keys: tuple[Node, ...]
    values: tuple[Node, ...]
    scale: float
    groups: int = 1
    """Heads of q that share one head of k and v."""
    mask: Node | None = None
    """Added to the scores of a key, or whether it is seen, `[.., 1, Lk]` or equal rows of it.

    A site with a `latent_mask` has one of different rows, `[.., Lq, Lk]`.
    """

    joined_keys: bool = False
    """Whether keys are slices of what was joined before its positions, and values say what of."""

    def seen(self) -> Operands:
        """Return the operands whose keys say where tokens come from: the values, if joined."""
        return replace(self, keys=self.values) if self.joined_keys else self

    def tensors(self) -> tuple[Node, ...]:
        """List q, all pieces and the mask; a node may come more than once."""
        return (self.q, *self.keys, *self.values, *([self.mask] if self.mask else []))

    def map(self, nodes: Mapping[Node, Node]) -> Operands:
        """Return the same operands in a copy of the graph."""
        keys, values = (tuple(nodes[x] for x in part) for part in (self.keys, self.values))
        mask = self.mask and nodes[self.mask]
        return replace(self, q=nodes[self.q], keys=keys, values=values, mask=mask)


def attention(
    node: Node,
    *,
    masked: bool = False,
    in_pieces: bool = True,
    by_rows: bool = False,
    mask_apart: bool = False,
) -> Operands | Refusal:
    """Match a canonical attention call that is a plain softmax over all keys.

    Args:
        node: the call.
        masked: take a mask too that is one for all queries, such as that of padded keys.
        in_pieces: take joined keys apart.
        by_rows: take a mask `[.., Lq, Lk]` too, which the caller proves to be one for the queries
            that matter.
        mask_apart: leave the mask to the caller, whatever it is.
    """
    places = places_of(node)
    if places is None:
        return Refusal("nobody has said where its operands are")
    mask = None
    if is_call(node, SDPA):
        mask = None if mask_apart else node.kwargs.get("attn_mask")
        if why := _not_plain(node, mask, masked=masked, by_rows=by_rows):
            return Refusal(why)
    q, k, v = (argument(node, place) for place in places[:3])
    if not (isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)):
        return Refusal("its operands are not tensors of the graph")
    ranks = [value(x).dim() for x in (q, k, v)]
    if ranks != [4, 4, 4]:
        return Refusal(f"q, k, v must be [B, H, L, D], got ranks {ranks}")
    if not known_true(value(q).shape[3] == value(v).shape[3]):
        return Refusal("head dims of q and v differ")
    grouped = node.kwargs.get("enable_gqa", False) or not is_call(node, SDPA)
    groups = _groups(value(q), value(k)) if grouped else 1
    if groups is None:
        return Refusal("heads of q are no whole number of groups of the heads of k (enable_gqa)")
    heads = value(q).shape[1] // groups
    if not (_is_batch(k, value(q).shape[0], heads) and _is_batch(v, value(q).shape[0], heads)):
        return Refusal("q and k differ in batch or heads")
    scale = places.scale
    if scale is not None and not isinstance(scale, float):
        scale = argument(node, scale)
    if scale is None:
        scale = constant(value(q).shape[3]) ** -0.5
    if not isinstance(scale, (int, float)):
        return Refusal("its scale is not a constant")
    scale = float(scale)
    # a mask covers the keys as they are joined
    in_pieces = in_pieces and mask is None
    keys, values = (joined(k), joined(v)) if in_pieces else ((k,), (v,))
    if len(keys) != len(values):
        keys, values = (k,), (v,)  # one was joined before its positions; `cut` takes it apart
    for i, (key, val) in enumerate(zip(keys, values, strict=True)):
        # torch does not tie the two sizes to each other when both come from inputs
        if not guard(value(key).shape[2] == value(val).shape[2]):
            return Refusal(f"pieces {i} of k and v differ in length")
    dtypes = {value(x).dtype for x in (node, q, *keys, *values)}
    if len(dtypes) > 1:
        return Refusal(f"its dtypes differ: {', '.join(sorted(map(str, dtypes)))}")
    if why := written_late(node, k, keys) or written_late(node, v, values):
        return Refusal(why)
    return Operands(q, keys, values, scale, groups, mask if isinstance(mask, Node) else None)


def _not_plain(node: Node, mask: object, *, masked: bool, by_rows: bool) -> str | None:
    """Say what a call of SDPA does beside a softmax over all keys, or return None."""
    if mask is not None and not masked:
        return "it has a mask"
    if mask is not None and (why := _of_queries(mask, node, by_rows=by_rows)):
        return why
    if node.kwargs.get("dropout_p", 0.0) != 0.0:
        return f"dropout is {node.kwargs['dropout_p']}"
    if node.kwargs.get("is_causal", False) is not False:
        return "it is causal"
    return None


def _of_queries(mask: object, node: Node, *, by_rows: bool) -> str | None:
    """Say that a mask may differ between queries, or that it is no row over the keys."""
    if not isinstance(mask, Node) or not isinstance(value(mask), torch.Tensor):
        return "it has a mask"
    shape, keys = value(mask).shape, value(node.args[1]).shape
    one = len(shape) < 2 or known_true(shape[-2] == 1) or same_for_all(mask)
    if not one and not by_rows:
        return f"it has a mask {_text(shape)}, which may differ between queries"
    if not shape or not known_true(shape[-1] == keys[2]):
        return f"it has a mask {_text(shape)}, which is broadcast over its keys"
    return None if len(shape) == 4 else f"it has a mask {_text(shape)} without batch and heads"


def _text(shape: torch.Size) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _groups(q: torch.Tensor, k: torch.Tensor) -> int | None:
    """Return how many heads of q share one of k; None if they cannot be grouped."""
    q_heads, k_heads = constant(q.shape[1]), constant(k.shape[1])
    if not (isinstance(q_heads, int) and isinstance(k_heads, int)) or q_heads % k_heads:
        return None
    return q_heads // k_heads


def _is_batch(tensor: Node, batch: Size, heads: Size) -> bool:
    shape = value(tensor).shape
    return known_true(shape[0] == batch) and known_true(shape[1] == heads)


def written_late(call: Node, joined: Node, pieces: tuple[Node, ...]) -> str | None:
    """Say what writes to keys between their concatenation and the call, which reads the pieces.

    A copy on the way may be of what was written to before it was made.
    """
    if pieces == (joined,):
        return None
    whole = same_values(joined)
    memory = {storage(value(tensor)) for tensor in (whole, *pieces)}
    while joined is not whole:
        memory.add(storage(value(joined)))
        joined = joined.all_input_nodes[0]
    for node in writes_between(whole, call):
        if memory_written(node) & memory:
            return f"%{node.name} writes to its keys or values in place"
    return None


def joined(tensor: Node) -> tuple[Node, ...]:
    """Return the inputs of a concatenation along the tokens, or the tensor itself."""
    tensor = same_values(tensor)
    if is_call(tensor, torch.cat) and tensor.args[1] == 2:
        pieces = tensor.args[0]
        if isinstance(pieces, (list, tuple)) and all(isinstance(p, Node) for p in pieces):
            return tuple(pieces)
    return (tensor,)
