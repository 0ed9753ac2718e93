"""Write attention in other spellings as `scaled_dot_product_attention`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from lipass.passes.attention.attention_ops import operator_attention
from lipass.passes.attention.match import Refusal
from lipass.passes.attention.products import View
from lipass.passes.attention.score_mask import as_attn_mask, keep_hidden_rows
from lipass.passes.attention.site import SDPA
from lipass.passes.attention.softmax_attention import Spelled, written_attention
from lipass.passes.core import PassContext
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.equivalence import Shape, difference
from lipass.passes.graph.ops import is_reshape
from lipass.passes.graph.writes import memory_written, storage, writes_between

# of the copy on which a rewrite is tried; all differ, heads of k divide those of q
_BATCH, _HEADS, _Q_TOKENS, _K_TOKENS, _FEATURES = 2, 3, 5, 7, 4


def other_spelling(node: Node) -> Spelled | Refusal | None:
    """Match attention that is no SDPA call, with the reason if it cannot be one."""
    found = operator_attention(node)
    return found if found is not None else written_attention(node)


def spell_as_sdpa(spelled: Spelled, ctx: PassContext) -> None:
    """Put an SDPA call in the place of `spelled.root`.

    Three axes `[B*H, L, D]` become four: those in front of the call that joined batch and heads,
    or `[1, B*H, L, D]`.
    """
    root, rank = spelled.root, len(spelled.out)
    emit = Emitter(root, ctx)
    q, k, v = (_in_order(view, emit) for view in (spelled.q, spelled.k, spelled.v))
    if rank == 3:
        split = [x for x in (_before_joining(x, root) for x in (q, k, v)) if x is not None]
        whole = len(split) == 3 and len({_heads(x) for x in split}) == 1
        q, k, v = split if whole else [emit.method("unsqueeze", x, 0) for x in (q, k, v)]
    options: dict[str, float | bool | Node] = {}
    if spelled.masks:
        options["attn_mask"] = as_attn_mask(
            spelled.masks, q if rank == 3 and whole else None, emit
        )
    # a default scale may be written as 1 / sqrt(D), which rounds differently
    if not math.isclose(spelled.scale, value(q).shape[-1] ** -0.5, rel_tol=1e-9):
        options["scale"] = spelled.scale
    if not known_true(value(q).shape[1] == value(k).shape[1]):
        options["enable_gqa"] = True
    out = emit(SDPA, q, k, v, **options)
    if isinstance(mask := options.get("attn_mask"), Node):
        out = keep_hidden_rows(out, mask, spelled.masks, v, emit)
    if rank == 3:
        out = emit.method("flatten", out, 0, 1) if whole else emit.method("squeeze", out, 0)
    if spelled.out != tuple(range(rank)):
        out = emit.method("permute", out, *spelled.out)
    root.replace_all_uses_with(out)


def wrong(spelled: Spelled) -> str | None:
    """Say how `spell_as_sdpa` changes the result, tried on small inputs, or return None.

    Raises:
        Incomparable: if the original does not run on small inputs.
    """
    shapes: dict[Node, Shape | torch.Tensor] = {}
    shared = len({view.node for view in (spelled.q, spelled.k, spelled.v)}) < 3
    for view in (spelled.q, spelled.k, spelled.v):
        tokens = _Q_TOKENS if view is spelled.q or shared else _K_TOKENS
        shape = _small(view, tokens)
        if shapes.setdefault(view.node, shape) != shape:
            return f"%{view.node.name} is used in two layouts"

    generator = torch.Generator("cpu").manual_seed(0)
    tokens = _Q_TOKENS if shared else _K_TOKENS
    sizes = (_BATCH, _HEADS, _Q_TOKENS, tokens)[-len(spelled.q.axes) :]
    for mask in spelled.masks:
        given = value(mask.mask).shape
        pairs = zip(given, sizes[-len(given) :], strict=True)
        small = tuple(1 if known_true(n == 1) else size for n, size in pairs)
        if isinstance(shapes.setdefault(mask.mask, mask.small(small, generator)), tuple):
            return f"%{mask.mask.name} is a mask and an operand"

    def rewrite(root: Node, copies: Mapping[Node, Node], ctx: PassContext) -> None:
        q, k, v = (View(copies[x.node], x.axes) for x in (spelled.q, spelled.k, spelled.v))
        masks = tuple(replace(mask, mask=copies[mask.mask]) for mask in spelled.masks)
        copy = replace(spelled, root=root, q=q, k=k, v=v, masks=masks)
        spell_as_sdpa(copy, ctx)

    return difference(spelled.root, shapes, rewrite)


def _small(view: View, tokens: int) -> Shape:
    """Return a small shape of `view.node`; it keeps the features, which the scale may be of."""
    features = value(view.node).shape[view.axes[-1]]
    sizes = [_BATCH, _HEADS, tokens, features if isinstance(features, int) else _FEATURES]
    shape = [0] * len(view.axes)
    for axis, size in zip(view.axes, sizes[-len(view.axes) :], strict=True):
        shape[axis] = size
    return tuple(shape)


def _in_order(view: View, emit: Emitter) -> Node:
    if view.axes == tuple(range(len(view.axes))):
        return view.node
    return emit.method("permute", view.node, *view.axes)


def _before_joining(tensor: Node, root: Node) -> Node | None:
    """Return `[B, H, L, D]` if `[B*H, L, D]` is a reshape of it that `root` can look through."""
    if not is_reshape(tensor):
        return None
    above = tensor.all_input_nodes[0]
    if value(above).dim() != 4:
        return None
    memory = {storage(value(above)), storage(value(tensor))}
    if any(memory_written(n) & memory for n in writes_between(tensor, root)):
        return None
    pairs = zip(value(above).shape[2:], value(tensor).shape[1:], strict=True)
    return above if all(known_true(a == b) for a, b in pairs) else None


def _heads(tensor: Node) -> tuple[str, str]:
    return str(value(tensor).shape[0]), str(value(tensor).shape[1])
