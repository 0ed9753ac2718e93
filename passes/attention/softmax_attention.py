"""Match attention that is written by hand, `softmax(Q K^T) V`, or say what it is instead."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lipass.passes.attention.match import Refusal
from lipass.passes.attention.products import Product, View, product
from lipass.passes.attention.score_chain import Chain, scores
from lipass.passes.attention.score_mask import Mask, why_not
from lipass.passes.graph.compat import is_parameter, known_true, value
from lipass.passes.graph.ops import is_cast
from lipass.passes.graph.writes import memory_written, storage, writes_between


@dataclass(frozen=True)
class Spelled:
    """Hold an attention in another spelling, by the operands that SDPA would take."""

    root: Node
    """The node whose value is the output."""
    q: View
    k: View
    v: View
    out: tuple[int, ...]
    """The value of `root` is `sdpa(q, k, v).permute(out)`."""
    scale: float
    how: str
    masks: tuple[Mask, ...] = ()
    """What hides keys or adds to their scores."""
    opaque: bool = False
    """Whether the original may be unable to run where it is compared, as a CUDA operator is."""


def written_attention(root: Node) -> Spelled | Refusal | None:
    """Match the product of weights and values of an attention written by hand.

    Returns a `Refusal` for what has the two products and weights in between, but is no plain
    softmax over the keys; None for what is no attention at all.
    """
    last = product(root)
    if last is None or last.added is not None:
        return None
    chain = Chain()
    first = scores(last.left.node, root, chain)
    if first is None:
        turned, other = scores(last.right.node, root, right := Chain()), last.left
        if turned is not None and right.softmax:
            return _unless_parameters(turned, other, "its weights are the right operand")
    if first is None or not (chain.softmax or chain.activation):
        return None
    why = chain.no_softmax() or chain.why or _mixed(first, last, chain)
    k_axes = (*first.right.axes[:-2], first.right.axes[-1], first.right.axes[-2])
    q, k, v = first.left.source(), View(first.right.node, k_axes).source(), last.right.source()
    why = why or _wrong_layout(k, "keys") or _wrong_layout(v, "values")
    why = why or _wrong_sizes(q, k, v)
    if not why:
        wide = q.node, k.node
        q, k = _narrowed(q, k, value(v.node).dtype)
        why = _written(root, (first.node, *wide), (q, k, v))
        why = why or why_not(chain.masks, first.node, value(q.node).dtype)
    scale = chain.scale * first.scale
    if not why and not (scale > 0 and math.isfinite(scale)):
        why = f"its scale is {scale:g}"
    refused = _unless_parameters(first, last.right, why)
    if why or refused is None:
        return refused
    return Spelled(root, q, k, v, last.out, scale, "softmax(Q K^T) V", tuple(chain.masks))


def _unless_parameters(first: Product, other: View, why: str) -> Refusal | None:
    """Refuse, except for what looks up a learned table, which is no attention over tokens."""
    for node in (first.left.node, first.right.node, other.node):
        above = View(node, tuple(range(value(node).dim()))).source().node
        if above.op == "get_attr" or (above.op == "placeholder" and is_parameter(above)):
            return None
    return Refusal(why)


def _mixed(first: Product, last: Product, chain: Chain) -> str:
    """Say that dtypes change other than for a wider softmax, or nothing."""
    rank = len(last.left.axes)
    if last.left.axes != tuple(range(rank)):
        return "its values are not summed over the keys"
    out, operands = value(last.node).dtype, value(last.right.node).dtype
    inner = value(first.node).dtype
    if out != operands or inner != value(first.left.node).dtype:
        return f"its products are in {inner} and {out}, not in the dtype of what they multiply"
    if chain.narrow is not None and chain.narrow.itemsize < inner.itemsize:
        return f"its softmax is in {chain.narrow}, narrower than its scores in {inner}"
    return ""


def _narrowed(q: View, k: View, dtype: torch.dtype) -> tuple[View, View]:
    """Take q and k from in front of a cast to a wider dtype, which attention does by itself."""
    if value(q.node).dtype == dtype:
        return q, k
    before = [_before_cast(view) for view in (q, k)]
    return before[0], before[1]


def _before_cast(view: View) -> View:
    node = view.node
    if not is_cast(node):
        return view
    source = node.all_input_nodes[0]
    above, below = value(source).dtype, value(node).dtype
    if torch.promote_types(above, below) != below:
        return view
    return View(source, view.axes).source()


def _wrong_layout(view: View, what: str) -> str:
    """Say that tokens and features cannot be told apart, because the first come behind."""
    tokens, features = view.axes[-2], view.axes[-1]
    if tokens < features or known_true(_differ(view)):
        return ""
    size = value(view.node).shape[tokens]
    return f"its {what} may be [.., D, L]: no call moves the axes, and both are {size}"


def _differ(view: View) -> Any:
    sizes = view.shape()
    return sizes[-1] != sizes[-2]


def _wrong_sizes(q: View, k: View, v: View) -> str:
    rank = len(q.axes)
    if rank not in (3, 4) or len(v.axes) != rank:
        return f"q, k, v must be [B, H, L, D], got ranks {[len(x.axes) for x in (q, k, v)]}"
    for other in (k, v):
        pairs = zip(q.shape()[:-2], other.shape()[:-2], strict=True)
        if not all(known_true(a == b) for a, b in pairs):
            return "q, k and v differ in batch or heads"
    dtypes = {value(x.node).dtype for x in (q, k, v)}
    before = {value(_before_cast(x).node).dtype for x in (q, k)} | {value(v.node).dtype}
    if len(dtypes) > 1 and len(before) > 1:
        return f"its dtypes differ: {', '.join(sorted(map(str, dtypes)))}"
    return ""


def _written(root: Node, readers: tuple[Node, ...], views: tuple[View, ...]) -> str:
    """Say what writes to q, k or v behind their first readers; SDPA would read them at `root`."""
    memory = {storage(value(view.node)) for view in views}
    inputs = {view.node for view in views}
    read = next(node for node in root.graph.nodes if node in readers and node not in inputs)
    for node in writes_between(read, root):
        if memory_written(node) & memory:
            return f"%{node.name} writes to q, k or v between its two products"
    return ""
