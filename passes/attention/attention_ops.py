"""Match attention that other libraries register as operators: flash_attn and FlexAttention."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lipass.passes.attention.match import Refusal
from lipass.passes.attention.products import View
from lipass.passes.attention.softmax_attention import Spelled
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.ops import name_of
from lipass.passes.graph.writes import mutates

_FLASH = re.compile(r"flash_attn")
_PLAIN = {
    "dropout_p": (0, 0.0),
    "causal": (False,),
    "is_causal": (False,),
    "window_size": (None, -1, (-1, -1), [-1, -1]),
    "window_size_left": (None, -1),
    "window_size_right": (None, -1),
    "softcap": (None, 0, 0.0),
    "alibi_slopes": (None,),
    "attention_chunk": (0,),
    "block_table": (None,),
    "q_descale": (None,),
    "k_descale": (None,),
    "v_descale": (None,),
}
"""Arguments of flash_attn by which it is more than plain attention, and values that avoid it."""
_HARMLESS = {
    "q", "k", "v", "softmax_scale", "deterministic", "num_splits", "pack_gqa", "sm_margin",
    "return_softmax", "return_attn_probs", "return_softmax_lse", "return_lse",
}  # fmt: skip
"""Arguments that change how or what else is computed, but not the output."""


def operator_attention(node: Node) -> Spelled | Refusal | None:
    """Match a call of a registered attention operator, or return None."""
    if is_call(node, torch.ops.higher_order.flex_attention):
        return _flex(node)
    name = _operator_name(node)
    if not _FLASH.search(name) or "backward" in name:
        return None
    return _flash(node, name.split("::")[-1])


def _operator_name(node: Node) -> str:
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(_schema(node).name)
    return ""


def _schema(node: Node) -> Any:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    return target._schema


def _flash(node: Node, name: str) -> Spelled | Refusal:
    """Match `flash_attn_func(q, k, v, ..)` with q, k, v `[B, L, H, D]`."""
    given: dict[str, Any] = {}
    for i, argument in enumerate(_schema(node).arguments):
        default = argument.default_value if argument.has_default_value() else None
        given[argument.name] = (
            node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default)
        )
    if packed := [key for key in given if "cu_seqlens" in key and given[key] is not None]:
        return Refusal(f"{name} packs sequences of several lengths ({packed[0]})")
    if not all(isinstance(given.get(key), Node) for key in "qkv"):
        return Refusal(f"{name} takes no separate q, k, v")
    for key, plain in _PLAIN.items():
        if key in given and given[key] not in plain:
            shown = f"%{given[key].name}" if isinstance(given[key], Node) else given[key]
            return Refusal(f"{key} of {name} is {shown}")
    if unknown := _unknown(node, given):
        return Refusal(f"{unknown} of {name} is not known to be harmless")
    ranks = [value(given[key]).dim() for key in "qkv"]
    if ranks != [4, 4, 4]:
        return Refusal(f"q, k, v of {name} must be [B, L, H, D], got ranks {ranks}")
    scale = given.get("softmax_scale")
    if scale is not None and not isinstance(scale, (int, float)):
        return Refusal("its scale is not a constant")
    root = _only_output(node)
    if isinstance(root, Refusal):
        return root
    axes = (0, 2, 1, 3)
    q, k, v = (View(given[key], axes).source() for key in "qkv")
    scale = float(value(given["q"]).shape[3] ** -0.5 if scale is None else scale)
    return Spelled(root, q, k, v, axes, scale, name, opaque=True)


def _unknown(node: Node, given: dict[str, Any]) -> str | None:
    """Return an argument that no list here names and that is not at its default."""
    for argument in _schema(node).arguments:
        key = argument.name
        if key in _HARMLESS or key in _PLAIN or given[key] is None:
            continue
        if not argument.has_default_value() or given[key] != argument.default_value:
            return str(key)
    return None


def _only_output(node: Node) -> Node | Refusal:
    """Return the attention output of a call whose other results nobody reads."""
    if isinstance(value(node), torch.Tensor):
        return node
    users = [user for user in node.users if user.users or user.op == "output"]
    for user in users:
        if not is_call(user, operator.getitem) or user.args[1] != 0:
            return Refusal(f"%{user.name} reads another result than its output")
    if len(users) != 1:
        return Refusal(f"its output is taken {len(users)} times, not once")
    return users[0]


def _flex(node: Node) -> Spelled | Refusal:
    """Match `flex_attention` without a score or mask function and over all blocks."""
    given: tuple[Any, ...] = node.args[:6]
    q, k, v, score_mod, block_mask, scale = given
    if not isinstance(scale, (int, float)):
        return Refusal("its scale is not a constant")
    if not _returns_first_input(node, score_mod):
        return Refusal(f"score_mod %{score_mod} changes its scores")
    if not _returns_true(node, block_mask[-1]):
        return Refusal(f"mask_mod %{block_mask[-1]} masks its scores")
    if why := _some_blocks(block_mask, value(q).shape[2], value(k).shape[2]):
        return Refusal(why)
    root = _only_output(node)
    if isinstance(root, Refusal):
        return root
    q, k, v = (View(x, (0, 1, 2, 3)).source() for x in (q, k, v))
    return Spelled(root, q, k, v, (0, 1, 2, 3), float(scale), "flex_attention", opaque=True)


def _body(node: Node, function: Any) -> GraphModule | None:
    body = getattr(node.graph.owning_module, str(getattr(function, "target", "")), None)
    return body if isinstance(body, GraphModule) else None


def _returns_first_input(node: Node, function: Any) -> bool:
    body = _body(node, function)
    if body is None:
        return False
    first = next(n for n in body.graph.nodes if n.op == "placeholder")
    return body.graph.output_node().all_input_nodes == [first]


def _returns_true(node: Node, function: Any) -> bool:
    """Whether a mask function returns a constant that lets everything pass."""
    body = _body(node, function)
    if body is None:
        return False
    if any(mutates(one) for one in body.graph.nodes):
        return False
    outputs = body.graph.output_node().all_input_nodes
    return [name_of(out) for out in outputs] in (["new_ones"], ["ones"])


def _some_blocks(block_mask: tuple[Any, ...], q_tokens: Any, k_tokens: Any) -> str:
    """Say that a block mask may leave out blocks, or nothing for the one that stands for none.

    The mask of a call without one is a single block, larger than any sequence.
    """
    numbers, q_block, k_block = block_mask[2], block_mask[-3], block_mask[-2]
    if not isinstance(numbers, Node) or numbers.op == "placeholder":
        return "its block mask is an input, whose blocks are data"
    is_one = is_call(numbers, torch.ones) and numbers.args[0] in ([1, 1, 1], (1, 1, 1))
    if is_one and known_true(q_tokens <= q_block) and known_true(k_tokens <= k_block):
        return ""
    return f"its block mask is computed by %{numbers.name}, and its blocks are data"
