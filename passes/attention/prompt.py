"""Recognise attention of a prompt to itself by its mask, where its tokens show no grid."""

from __future__ import annotations

import torch
from torch.fx import Node

from lipass.passes.attention.site import SDPA
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import is_parameter, known_true, value


def is_padded_prompt(call: Node) -> bool:
    """Whether a mask says of each token of q and k whether there is one: `[B, L]`, not of floats.

    Prompts are padded, so their encoders are given such a mask; of latents all are there. The mask
    is `seen[:, None, :, None] & seen[:, None, None, :]` in any spelling: nothing but that one
    input goes into it, and it has a row a query.
    """
    mask = call.kwargs.get("attn_mask") if is_call(call, SDPA) else None
    if not isinstance(mask, Node) or not isinstance(value(mask), torch.Tensor):
        return False
    tokens = value(mask).shape[-1]
    rows = value(mask).shape[-2] if value(mask).dim() > 1 else 1
    if not known_true(rows == tokens) or known_true(rows == 1):
        return False
    given = [node for node in _above(mask) if node.op in ("placeholder", "get_attr")]
    tensors = [node for node in given if isinstance(value(node), torch.Tensor)]
    return len(tensors) == 1 and _says_which(tensors[0], tokens)


def _says_which(node: Node, tokens: object) -> bool:
    tensor = value(node)
    if is_parameter(node) or tensor.is_floating_point() or tensor.dim() != 2:
        return False
    return known_true(tensor.shape[1] == tokens)


def _above(node: Node) -> set[Node]:
    seen, todo = {node}, [node]
    while todo:
        fresh = [one for one in todo.pop().all_input_nodes if one not in seen]
        seen.update(fresh)
        todo += fresh
    return seen
