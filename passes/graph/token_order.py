"""Follow tokens through calls that treat each of them alike, in whatever order they come.

For a call `f` and an order `p` of tokens, `through` shows that `f(x[p]) == f(x)[p]`, up to the
order of sums, and says which other operands have to be put in that order too.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from lipass.passes.attention.site import Grid
from lipass.passes.graph.axis_labels import Labels, from_right, of_attention, of_product
from lipass.passes.graph.compat import Size, known_true, value
from lipass.passes.graph.ops import (
    argument,
    is_expansion,
    is_norm_of_rows,
    is_pointwise,
    is_reshape,
    moved_axes,
    name_of,
    reads,
)
from lipass.passes.graph.token_views import Axes, indexed, parts, reshaped
from lipass.passes.graph.writes import mutates

_BLANKS = {"empty_like", "zeros_like", "ones_like", "full_like"}
# Over one axis or several; whatever the order of what they take together.
_SUMS = {"sum", "mean", "amax", "amin", "var", "std", "logsumexp", "any", "all", "prod"}
_NORMS = {"norm", "linalg_norm", "linalg_vector_norm"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_SIZES = {"dim", "element_size", "getattr", "is_contiguous", "ndimension", "numel", "size"}
_SIZES |= {"stride", "sym_numel", "sym_size", "sym_stride"}
_ALONG = {"softmax", "log_softmax", "normalize"}


@dataclass(frozen=True, eq=False)
class Clip:
    """Name the latents whose tokens change their order; compared as an object."""

    grid: Grid
    tile: tuple[int, int, int]

    @property
    def stays_in_latents(self) -> bool:
        """Whether each token stays among those of its latent."""
        return self.tile[0] == 1 or known_true(self.grid[0] == 1)


class Tokens(NamedTuple):
    """Say which axis of a tensor holds tokens in the order of the tiles."""

    clip: Clip
    axis: int
    whole: bool
    """Whether the axis holds those of all latents, or those of one, with latents elsewhere."""

    @property
    def order(self) -> tuple[Clip, bool]:
        """What two axes of tokens have to have in common."""
        return self.clip, self.whole

    @property
    def size(self) -> Size:
        """Length of the axis."""
        t, y, x = self.clip.grid
        return t * y * x if self.whole else y * x


class Kept(NamedTuple):
    """Say how a call looks on tokens in another order."""

    tokens: Tokens | None
    """Where the result has them; None if it is the same in every order."""
    enter: dict[Node, Tokens]
    """Operands in the order of the model that have to be put in this one."""
    leaves: bool = False
    """Whether the call cuts the tokens back into a grid, and must get them in its own order."""


At = Mapping[Node, Tokens]


def through(node: Node, at: At) -> Kept | str:
    """Follow tokens through a call, or say why that cannot be done.

    Args:
        node: a call of which at least one input is in `at`.
        at: tensors, or tuples of them, whose tokens are in another order.
    """
    if mutates(node):
        return _written(node, at)
    name = name_of(node)
    if not _has_tensors(node):
        return Kept(None, {}) if name in _SIZES else _unknown(node)
    read = [one for one in reads(node) if one in at]
    if not read and name not in _BLANKS:
        return Kept(None, {})  # of a shape or a dtype alone
    first = next(one for one in node.all_input_nodes if one in at)
    if name in _BLANKS:
        return _of_one(node, name, first, at[first])
    if is_pointwise(node) or (name == "where" and isinstance(value(node), torch.Tensor)):
        return _aligned(node, at)
    if name in ("cat", "stack"):
        return _joined(node, name, at)
    if labels := of_product(node, name) or of_attention(node):
        return _labelled(labels, at)
    if len([one for one in node.all_input_nodes if one in at]) > 1:
        return _unknown(node)
    return _of_one(node, name, first, at[first])


def _of_one(node: Node, name: str, x: Node, tokens: Tokens) -> Kept | str:
    """Follow tokens through a call that takes them as its first argument."""
    if node.args[:1] != (x,):
        return _unknown(node)
    if name == "getitem" and isinstance(value(x), (tuple, list)):
        return Kept(tokens, {})
    if name in _BLANKS and value(node).dim() == value(x).dim():
        return Kept(tokens, {})
    rank, axis = value(x).dim(), tokens.axis
    if (axes := moved_axes(node)) is not None:
        return Kept(tokens._replace(axis=axes.index(axis)), {})
    if is_reshape(node):
        return _reshaped(node, x, tokens)
    if is_expansion(node):
        return Kept(tokens._replace(axis=axis + value(node).dim() - rank), {})
    if name == "linear":
        return Kept(tokens, {}) if axis != rank - 1 else _unknown(node)
    if is_norm_of_rows(node):
        shape = argument(node, 1, "normalized_shape")
        across = len(shape) if isinstance(shape, (list, tuple)) else rank
        return Kept(tokens, {}) if axis < rank - across else _unknown(node)
    if name in _ALONG:
        return Kept(tokens, {})
    if name in _SUMS | _NORMS:
        return _summed(node, tokens, rank, 2 if name in _NORMS else 1)
    if name in _CONVOLUTIONS:  # along other axes, each token by itself
        return Kept(tokens, {}) if axis == 0 and value(node).dim() == rank else _unknown(node)
    found = indexed(node, axis) if name == "getitem" else parts(node, name, axis)
    return _unknown(node) if found is None else Kept(tokens._replace(axis=found), {})


def _reshaped(node: Node, x: Node, tokens: Tokens) -> Kept | str:
    apart = tokens.clip.stays_in_latents
    axes = Axes(tokens.clip.grid, tokens.axis, tokens.whole)
    found = reshaped(value(x).shape, value(node).shape, axes, apart)
    if found is None:
        lies = "" if apart else "; a tile of one latent, such as (1, 8, 8), may mend it"
        return f"%{node.name} cuts or joins tokens by their places{lies}"
    if found.whole is None:
        return Kept(None, {}, leaves=True)
    return Kept(tokens._replace(axis=found.axis, whole=found.whole), {})


def _summed(node: Node, tokens: Tokens, rank: int, place: int) -> Kept | str:
    dims = argument(node, place, "dim", node.kwargs.get("axis"))
    if dims is None or dims == ():
        return Kept(None, {})
    dims = [one % rank for one in ((dims,) if isinstance(dims, int) else dims)]
    if not isinstance(value(node), torch.Tensor):
        return _unknown(node)
    if tokens.axis in dims:
        return Kept(None, {})
    kept = value(node).dim() == rank
    gone = 0 if kept else sum(one < tokens.axis for one in dims)
    return Kept(tokens._replace(axis=tokens.axis - gone), {})


def _written(node: Node, at: At) -> Kept | str:
    """Follow tokens that are written to other tokens, in the place of those."""
    target = node.args[0] if node.args else None
    refused = f"%{node.name} writes tokens to memory that is not theirs"
    if not isinstance(target, Node) or target not in at:
        return refused
    if is_pointwise(node, in_place=True):
        return _aligned(node, at)
    if name_of(node) != "setitem":
        return refused
    rank = value(target).dim()
    axis = indexed(node, at[target].axis)
    given = node.args[2]
    if axis is None:
        return refused
    if not isinstance(given, Node):
        return Kept(None, {})
    index: Any = node.args[1]
    items = index if isinstance(index, tuple) else (index,)
    gone = sum(isinstance(item, int) for item in items) - sum(item is None for item in items)
    labels = [(given, from_right(given)), (target, [axis - rank + gone])]
    found = _labelled((labels, []), {**at, target: at[target]._replace(axis=0)})
    return found if isinstance(found, str) else Kept(None, found.enter)


def _labelled(labels: Labels, at: At) -> Kept | str:
    """Follow tokens through a call whose operands share axes of one label.

    Axes that the result has not are summed over, in whatever order.
    """
    operands, out = labels
    marked: dict[Hashable, Tokens] = {}
    for one, names in operands:
        if one not in at:
            continue
        label = names[at[one].axis]
        if label in marked and marked[label].order != at[one].order:
            return f"%{one.name} holds tokens of another grid than what it meets"
        marked[label] = at[one]
    enter: dict[Node, Tokens] = {}
    for one, names in operands:
        for axis, label in enumerate(names):
            if label not in marked or (one in at and at[one].axis == axis):
                continue
            size = value(one).shape[axis]
            if known_true(size == 1) or _is_repeated(one, axis):
                continue
            wanted = marked[label]._replace(axis=axis)
            if one in at or enter.get(one, wanted) != wanted:
                return f"%{one.name} has more than one axis of tokens"
            if not known_true(size == wanted.size):
                return f"%{one.name} is not as long as the tokens that it meets"
            enter[one] = wanted
    shown = [(axis, label) for axis, label in enumerate(out) if label in marked]
    if len(shown) > 1:
        return "a product of tokens with tokens has two axes of them"
    if not shown:
        return Kept(None, enter)
    axis, label = shown[0]
    return Kept(marked[label]._replace(axis=axis), enter)


def _is_repeated(node: Node, axis: int) -> bool:
    """Whether all numbers along an axis are one, as behind `expand`."""
    if not is_expansion(node):
        return False
    above = value(node.all_input_nodes[0])
    at = axis - value(node).dim() + above.dim()
    return at < 0 or known_true(above.shape[at] == 1)


def _aligned(node: Node, at: At) -> Kept | str:
    operands = [one for one in reads(node) if isinstance(value(one), torch.Tensor)]
    return _labelled(([(one, from_right(one)) for one in operands], from_right(node)), at)


def _joined(node: Node, name: str, at: At) -> Kept | str:
    pieces = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", 0)
    if not isinstance(pieces, (list, tuple)) or not isinstance(dim, int):
        return _unknown(node)
    rank = value(node).dim()
    out = list(range(rank))
    names: list[Hashable] = list(out)
    if name == "stack":
        names.remove(dim % rank)
    elif any(one in at and at[one].axis == dim % rank for one in pieces):
        return f"%{node.name} joins tokens with others"
    else:
        names[dim % rank] = "joined"  # pieces differ in length there
    return _labelled(([(one, names) for one in dict.fromkeys(pieces)], list(out)), at)


def _has_tensors(node: Node) -> bool:
    found = value(node)
    leaves = found if isinstance(found, (tuple, list)) else (found,)
    return any(isinstance(leaf, torch.Tensor) for leaf in leaves)


def _unknown(node: Node) -> str:
    what = name_of(node) or getattr(node.target, "__name__", str(node.target))
    return f"%{node.name} ({what}) may read tokens by their places"
