"""Read the masks and biases of an attention written by hand, and write them as those of SDPA."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lipass.passes.attention.products import operand
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.emit import Emitter, emit_behind
from lipass.passes.graph.ops import argument, name_of
from lipass.passes.graph.writes import writers_of

HIDDEN = -1e4
"""A score as low as this takes no weight beside any other: exp of the difference is 0 in fp32."""
_NOTS = ("invert", "bitwise_not", "logical_not")
_FULL = {"full": 1, "new_full": 2, "full_like": 1, "tensor": 0, "scalar_tensor": 0}


@dataclass(frozen=True)
class Fill:
    """Say which scores give way to a number so low that their keys are hidden."""

    mask: Node
    """Bool, broadcast to the scores."""
    shown: bool
    """Whether it is true where a score stays."""
    number: float
    since: Node
    """The first call that reads the mask."""

    def small(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Make a mask of a small shape by which each query sees a key."""
        shown = torch.rand(shape, generator=generator) < 0.5
        shown[..., 0] = True
        return shown if self.shown else ~shown


@dataclass(frozen=True)
class Bias:
    """Say what is added to the scores."""

    mask: Node
    """Floats, broadcast to the scores."""
    factor: float
    """What the sum is multiplied by in front of the softmax."""
    since: Node

    def small(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Make numbers to add of a small shape."""
        return torch.randn(shape, generator=generator)


Mask = Fill | Bias


def read_fill(node: Node, above: Node, factor: float) -> Fill | str:
    """Read `masked_fill` or `where` of scores, which are multiplied by `factor` behind it."""
    name = name_of(node)
    if name == "masked_fill":
        mask, shown, number = argument(node, 1, "mask"), False, argument(node, 2, "value")
    elif name == "where":
        mask, kept, other = _of_where(node)
        shown = kept is above
        number = other if shown else kept
    else:
        return f"%{node.name} masks its scores"
    if not isinstance(mask, Node) or value(mask).dtype != torch.bool:
        return f"%{node.name} masks its scores by no mask of its own"
    filled = number_of(number)
    if filled is None:
        return f"%{node.name} masks its scores by numbers that are no constant"
    if not (factor > 0 and filled * factor <= HIDDEN):
        return f"%{node.name} masks its scores by {filled * factor:g}, which hides no key"
    mask, shown, since = _without_nots(mask, shown, node)
    return Fill(mask, shown, filled * factor, since)


def read_bias(node: Node, above: Node, factor: float) -> Bias | str:
    """Read a sum of scores and a tensor, which is multiplied by `factor` behind it."""
    why = f"%{node.name} adds to its scores"
    others = [one for one in (operand(node, 0), operand(node, 1)) if one is not above]
    sign = -1.0 if name_of(node) == "sub" else 1.0
    if len(others) != 1 or node.kwargs.get("alpha", 1) != 1:
        return why
    bias = others[0]
    if not isinstance(bias, Node) or not isinstance(value(bias), torch.Tensor):
        return why
    if sign < 0 and operand(node, 0) is not above:
        return f"%{node.name} takes its scores away"
    return bias_of(bias, sign * factor, node)


def bias_of(bias: Node, factor: float, node: Node) -> Bias | str:
    """Read a tensor that a call adds to scores."""
    why = f"%{node.name} adds to its scores"
    if value(bias).dim() == 0 or not value(bias).is_floating_point():
        return f"{why} no mask of floats"
    return Bias(bias, factor, node)


def number_of(given: Any) -> float | None:
    """Return the number that fills a tensor, or the number itself; None if it is not known."""
    if isinstance(given, (int, float)):
        return float(given)
    if not isinstance(given, Node) or name_of(given) not in _FULL or writers_of(given):
        return None
    keys = ("fill_value", "data", "s")
    found = [given.kwargs[key] for key in keys if key in given.kwargs]
    at = _FULL[name_of(given)]
    found = found or list(given.args[at : at + 1])
    return float(found[0]) if found and isinstance(found[0], (int, float)) else None


def why_not(masks: list[Mask], scores: Node, dtype: torch.dtype) -> str:
    """Say why masks cannot be one mask of SDPA, or return nothing.

    Args:
        masks: those of one attention.
        scores: the product that they are for.
        dtype: of q, k and v.
    """
    if len({type(one) for one in masks}) > 1:
        return "it both adds to its scores and masks them"
    if len({one.number for one in masks if isinstance(one, Fill)}) > 1:
        return "its scores are masked by several numbers"
    for one in masks:
        tensor = value(one.mask)
        if late := [write for write in writers_of(one.mask) if write > one.since]:
            return f"%{late[0].name} writes to its mask behind it"
        if isinstance(one, Bias) and tensor.dtype not in (dtype, torch.float32):
            return f"its mask is in {tensor.dtype}, its keys in {dtype}"
        pairs = zip(reversed(tensor.shape), reversed(value(scores).shape), strict=False)
        if not all(known_true(a == 1) or known_true(a == b) for a, b in pairs):
            return f"its mask %{one.mask.name} is no part of its scores"
    return ""


def as_attn_mask(masks: tuple[Mask, ...], heads: Node | None, emit: Emitter) -> Node:
    """Emit the mask of SDPA, `[B or 1, H or 1, Lq or 1, Lk or 1]`, bool or floats.

    Args:
        masks: those of the scores.
        heads: a tensor `[B, H, ..]` where scores `[B*H, Lq, Lk]` are to be taken apart.
        emit: inserts calls in front of the attention.
    """
    parts = [_as_written(one, emit) for one in masks]
    parts = [_with_four_axes(one, heads, emit) for one in parts]
    whole = parts[0]
    for part in parts[1:]:
        whole = emit(operator.and_ if isinstance(masks[0], Fill) else operator.add, whole, part)
    return whole


def keep_hidden_rows(
    out: Node, mask: Node, masks: tuple[Mask, ...], values: Node, emit: Emitter
) -> Node:
    """Emit what a softmax gives queries that see no key, for which SDPA gives 0.

    That is NaN where scores are -inf, and the mean of all values where they are one number.
    """
    first = masks[0]
    shown = mask
    if isinstance(first, Bias):
        shown = emit_behind(mask, emit.ctx, operator.gt, -math.inf)
    rows = emit_behind(shown, emit.ctx, torch.any, -1, True)
    if isinstance(first, Fill) and first.number > -math.inf:
        return emit(torch.where, rows, out, emit(torch.mean, values, -2, True))
    return emit(torch.where, rows, out, math.nan)


def _as_written(one: Mask, emit: Emitter) -> Node:
    if isinstance(one, Fill):
        return one.mask if one.shown else emit_behind(one.mask, emit.ctx, torch.logical_not)
    if one.factor == 1.0:
        return one.mask
    return emit_behind(one.mask, emit.ctx, operator.mul, one.factor)


def _with_four_axes(mask: Node, heads: Node | None, emit: Emitter) -> Node:
    rank = value(mask).dim()
    if heads is not None and rank == 3 and not known_true(value(mask).shape[0] == 1):
        sizes = tuple(emit.size(value(heads).shape[axis], heads, axis) for axis in (0, 1))
        return emit.method("unflatten", mask, 0, sizes)
    if rank == 4:
        return mask
    return emit_behind(mask, emit.ctx, operator.getitem, (*(None,) * (4 - rank), Ellipsis))


def _without_nots(mask: Node, shown: bool, since: Node) -> tuple[Node, bool, Node]:
    """Take a mask from in front of calls that only turn it over."""
    while True:
        above = mask.all_input_nodes[0] if mask.all_input_nodes else None
        turned = name_of(mask) in _NOTS
        if name_of(mask) == "eq":
            turned = 0 in mask.args and len(mask.all_input_nodes) == 1
        if not turned or above is None or value(above).dtype != torch.bool or writers_of(mask):
            return mask, shown, since
        mask, shown, since = above, not shown, mask


def _of_where(node: Node) -> tuple[Any, Any, Any]:
    """Return the condition of `where`, what it keeps, and what it puts elsewhere."""
    first, second, *third = (*node.args, None, None, None)[:3]
    if node.op == "call_method":
        first, second = second, first
    kept = node.kwargs.get("input", node.kwargs.get("self", second))
    return node.kwargs.get("condition", first), kept, node.kwargs.get("other", third[0])
