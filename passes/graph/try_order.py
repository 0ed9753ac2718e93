"""Make a call on a few tokens in two orders, to see that it treats each of them alike.

The rules of `token_order` follow names and tags; this follows what the call does, at sizes that
are small and differ from each other. Calls that only look at tokens in another way have no small
form, as the sizes they name are of the model, and are not tried.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from lipass.passes.graph.compat import hint, undisturbed, value
from lipass.passes.graph.ops import is_other_look, name_of
from lipass.passes.graph.token_order import At, Kept

_TOKENS = 6
_PLACES = {"getitem", "setitem", "select", "narrow", "index_select", "empty_like"}


def differs(node: Node, at: At, kept: Kept) -> str | None:
    """Say that a call gives other results where its tokens come in another order, or return None.

    Args:
        node: the call.
        at: tensors whose tokens are in another order.
        kept: what was concluded from the rules.
    """
    if kept.leaves or not _has_small_form(node):
        return None
    moved = {one: at[one].axis for one in node.all_input_nodes if one in at}
    moved |= {one: tokens.axis for one, tokens in kept.enter.items()}
    generator = torch.Generator("cpu").manual_seed(0)
    with undisturbed(), torch.no_grad():
        order = torch.randperm(_TOKENS, generator=generator)
        try:
            sizes = _small_sizes(node, moved)
            inputs = {
                one: _draw(value(one), moved.get(one), sizes, generator)
                for one in node.all_input_nodes
            }
            first = _run(node, inputs, sizes)
            second = _run(
                node,
                {
                    one: x.index_select(moved[one], order) if one in moved else x
                    for one, x in inputs.items()
                },
                sizes,
            )
        except Exception:  # it has no small form
            return None
    expected = first if kept.tokens is None else first.index_select(kept.tokens.axis, order)
    loose = 1e-4 if first.dtype in (torch.float32, torch.float64) else 2e-2
    if second.shape == expected.shape and torch.allclose(
        second.to(torch.float64), expected.to(torch.float64), loose, loose, equal_nan=True
    ):
        return None
    return f"%{node.name} gives other results where its tokens come in another order"


def _has_small_form(node: Node) -> bool:
    if not isinstance(value(node), torch.Tensor) or value(node).is_complex():
        return False
    ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "lipass"
    return not (ours or is_other_look(node) or name_of(node) in _PLACES)


def _small_sizes(node: Node, moved: dict[Node, int]) -> dict[int, int]:
    """Map each size of the operands to a small one of its own."""
    found = {
        hint(size)
        for one in node.all_input_nodes
        if isinstance(value(one), torch.Tensor)
        for axis, size in enumerate(value(one).shape)
        if axis != moved.get(one)
    }
    return {1: 1} | {size: n for n, size in enumerate(sorted(found - {1}), 2)}


def _draw(fake: Any, axis: int | None, sizes: dict[int, int], generator: torch.Generator) -> Any:
    """Draw a small tensor like a fake one; sizes and numbers stay what they are."""
    if not isinstance(fake, torch.Tensor):
        return hint(fake) if isinstance(fake, torch.SymInt) else fake
    shape = [_TOKENS if n == axis else sizes[hint(size)] for n, size in enumerate(fake.shape)]
    if fake.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if fake.is_floating_point():
        return torch.randn(shape, generator=generator).to(fake.dtype)
    return torch.randint(1, 4, shape, generator=generator).to(fake.dtype)


def _run(node: Node, inputs: dict[Node, Any], sizes: dict[int, int]) -> torch.Tensor:
    inputs = {one: x.clone() if isinstance(x, torch.Tensor) else x for one, x in inputs.items()}
    args, kwargs = map_arg((node.args, node.kwargs), inputs.__getitem__)
    if name_of(node) in ("layer_norm", "rms_norm"):  # which name a size of their operand
        args, kwargs = map_aggregate(
            (args, kwargs), lambda one: sizes.get(one, one) if type(one) is int else one
        )
    if node.op == "call_method":
        out = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        out = node.target(*args, **kwargs)  # type: ignore[operator]
    assert isinstance(out, torch.Tensor)
    return out
