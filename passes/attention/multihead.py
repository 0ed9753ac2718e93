"""Spell `torch.nn.MultiheadAttention` as the projections and the attention that it is made of.

Dynamo keeps its function whole, and passes see neither queries nor keys. What torch does is
written out, with all heads on an axis of their own::

    %out = multi_head_attention_forward(%x, %x, %x, 256, 4, %w, %b, .., %w_out, %b_out)

    %q, %k, %v = chunk(linear(%x, %w, %b), 3, -1)   # one product where all three are one tensor
    %q = permute(reshape(%q, l, b, 4, 64), 1, 2, 0, 3)  # and keys and values
    %a = scaled_dot_product_attention(%q, %k, %v)
    %out = linear(reshape(permute(%a, 2, 0, 1, 3), l, b, 256), %w_out, %b_out)

Source: torch's own `multi_head_attention_forward`.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.nn import functional as F

from lipass.passes.attention.match import Refusal
from lipass.passes.attention.site import SDPA
from lipass.passes.core import PassContext
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.emit import Emitter

_WHOLE = F.multi_head_attention_forward
_SIGNATURE = inspect.signature(_WHOLE)


def spell_multihead(node: Node, ctx: PassContext) -> bool | Refusal:
    """Put projections and an SDPA call in the place of one whole call.

    Keeps: weights of attention that somebody reads, dropout, keys and values beside those of the
    tokens, and masks where torch takes softmax itself, which gives NaN to queries without keys.

    Args:
        node: any node.
        ctx: of the pass.

    Returns:
        Whether it was done, or why it was not.
    """
    if node.op != "call_function" or not is_call(node, _WHOLE):
        return False
    try:
        bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    except TypeError:
        return Refusal("its arguments are not those of torch's function")
    bound.apply_defaults()
    given = bound.arguments
    readers = [user for user in node.users if not is_call(user, operator.getitem)]
    if readers or any(user.args[1] != 0 for user in node.users if user.users):
        return Refusal("its weights are read; pass need_weights=False, or leave them unread")
    if why := _why_kept(given):
        return Refusal(why)
    out = _Spelling(Emitter(node, ctx), given).spell()
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(out)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return True


def _why_kept(given: Mapping[str, Any]) -> str | None:
    if given["training"] and given["dropout_p"] > 0:
        return "it has dropout; call the model in eval mode"
    if given["bias_k"] is not None or given["bias_v"] is not None or given["add_zero_attn"]:
        return "it adds a key of its own (add_bias_kv or add_zero_attn)"
    if given["static_k"] is not None or given["static_v"] is not None:
        return "it is given keys or values that are projected already"
    masked = given["attn_mask"] is not None or given["key_padding_mask"] is not None
    if masked and given["need_weights"]:
        return "it has a mask and makes its weights; pass need_weights=False"
    if not all(isinstance(value(given[name]), torch.Tensor) for name in ("query", "key", "value")):
        return "its operands are no tensors"
    return None


class _Spelling:
    """The calls of one module; axes `[L, B, C]` as torch has them."""

    def __init__(self, emit: Emitter, given: Mapping[str, Any]) -> None:
        self.emit, self.given = emit, given
        self.heads = int(given["num_heads"])
        self.features = int(given["embed_dim_to_check"]) // self.heads

    def spell(self) -> Node:
        """Emit all of it; returns what the module returns first."""
        given, emit = self.given, self.emit
        operands = [given[name] for name in ("query", "key", "value")]
        batched = value(operands[0]).dim() == 3
        if not batched:
            whole = {one: emit.method("unsqueeze", one, 1) for one in dict.fromkeys(operands)}
            operands = [whole[one] for one in operands]
        q, k, v = (self._by_heads(one) for one in self._projected(*operands))
        mask = self._mask(q, k)
        options: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
        # Beside padded keys torch takes the mask that came with the hint, not the hint.
        if given["is_causal"] and given["key_padding_mask"] is None and not given["need_weights"]:
            options = {"is_causal": True}
        out = emit(SDPA, q, k, v, **options)
        tokens, batch = (emit.size(value(operands[0]).shape[i], operands[0], i) for i in (0, 1))
        out = emit.method("permute", out, 2, 0, 1, 3)
        out = emit.method("reshape", out, tokens, batch, self.heads * self.features)
        out = emit(F.linear, out, given["out_proj_weight"], given["out_proj_bias"])
        return out if batched else emit.method("squeeze", out, 1)

    def _projected(self, query: Node, key: Node, content: Node) -> list[Node]:
        """Return queries, keys and values `[L, B, C]`."""
        given, emit = self.given, self.emit
        weight, bias = given["in_proj_weight"], given["in_proj_bias"]
        biases = [None] * 3 if bias is None else self._thirds(bias)
        if given["use_separate_proj_weight"]:
            weights = [given[f"{name}_proj_weight"] for name in "qkv"]
        elif query is key is content:
            return self._thirds(emit(F.linear, query, weight, bias), -1)
        else:
            weights = self._thirds(weight)
        operands = (query, key, content)
        return [emit(F.linear, *each) for each in zip(operands, weights, biases, strict=True)]

    def _thirds(self, tensor: Node, dim: int = 0) -> list[Node]:
        parts = self.emit(torch.chunk, tensor, 3, dim)
        return [self.emit(operator.getitem, parts, i) for i in range(3)]

    def _by_heads(self, tensor: Node) -> Node:
        """Turn `[L, B, H * D]` into `[B, H, L, D]`."""
        tokens, batch = (self.emit.size(value(tensor).shape[i], tensor, i) for i in (0, 1))
        split = self.emit.method("reshape", tensor, tokens, batch, self.heads, self.features)
        return self.emit.method("permute", split, 1, 2, 0, 3)

    def _mask(self, q: Node, k: Node) -> Node | None:
        """Add up masks as `[B or 1, H or 1, L or 1, Lk]`, in the dtype of queries."""
        found = None
        batch, keys = (
            self.emit.size(value(k).shape[0], k, 0),
            self.emit.size(value(k).shape[2], k, 2),
        )
        for name in ("attn_mask", "key_padding_mask"):
            if (mask := self.given[name]) is None:
                continue
            if value(mask).dtype == torch.bool:  # says what is hidden, SDPA's what is seen
                zeros = self.emit(torch.zeros_like, mask, dtype=value(q).dtype)
                mask = self.emit.method("masked_fill", zeros, mask, -math.inf)
            if name == "key_padding_mask":
                mask = self.emit.method("reshape", mask, batch, 1, 1, keys)
            elif value(mask).dim() == 2:
                mask = self.emit.method("reshape", mask, 1, 1, *self._rows(q, keys))
            elif known_true(value(mask).shape[0] == 1):
                mask = self.emit.method("unsqueeze", mask, 0)
            else:
                mask = self.emit.method("reshape", mask, batch, self.heads, *self._rows(q, keys))
            found = mask if found is None else self.emit(operator.add, found, mask)
        return found

    def _rows(self, q: Node, keys: int | Node) -> tuple[int | Node, int | Node]:
        return self.emit.size(value(q).shape[2], q, 2), keys
