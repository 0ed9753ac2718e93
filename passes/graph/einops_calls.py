"""Spell calls of einops that a graph holds whole as the calls of torch that they make.

Releases before 0.8.2 are no code to Dynamo: `rearrange` and `repeat` are one node each, and what
they do to axes no pass sees. A pattern says it all; the order of the calls is that of einops, so
the result is a view where it was one::

    %rows = repeat(%vec, '(B T) C -> B (T H W) C', B=1, H=30, W=52)
    reshape(%vec, 1, t, c); unsqueeze(.., 2); unsqueeze(.., 3); expand(.., -1, -1, 30, 52, -1);
    reshape(.., 1, t * 1560, c)
"""

from __future__ import annotations

import math
import operator
import re
from typing import Any

import torch
from torch.fx import Node

from lipass.passes.core import PassContext
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.emit import Emitter

_CALLS = ("rearrange", "repeat")
_GROUP = re.compile(r"\(([^()]*)\)|(\S+)")
Group = list[str]
Length = int | Node


def spell_einops(node: Node, ctx: PassContext) -> bool:
    """Put calls of torch in the place of one of einops; return whether that was done.

    Keeps: lists of tensors, and what einops would refuse.
    """
    if node.op != "call_function" or getattr(node.target, "__name__", "") not in _CALLS:
        return False
    if not str(getattr(node.target, "__module__", "")).startswith("einops"):
        return False
    given = dict(zip(("tensor", "pattern"), node.args, strict=False)) | node.kwargs
    tensor, pattern = given.pop("tensor", None), given.pop("pattern", None)
    if not isinstance(tensor, Node) or not isinstance(pattern, str):
        return False
    if not isinstance(value(tensor), torch.Tensor) or pattern.count("->") != 1:
        return False
    sides = [_groups(side, value(tensor).dim(), pattern) for side in pattern.split("->")]
    if sides[0] is None or sides[1] is None or len(sides[0]) != value(tensor).dim():
        return False
    made = _Spelling(Emitter(node, ctx), given).spell(tensor, sides[0], sides[1])
    if made is None:
        return False
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return True


def _groups(side: str, rank: int, pattern: str) -> list[Group] | None:
    """List the axes of each axis of a tensor; one that is 1 has none."""
    left = pattern.split("->")[0]
    missing = rank - len(_GROUP.findall(left)) + 1
    names = [f"...{n}" for n in range(missing)]
    found: list[Group] = []
    for joined, single in _GROUP.findall(side):
        if single == "...":
            found += [[name] for name in names]
            continue
        group: Group = []
        for name in joined.split() if not single else [single]:
            if name == "...":
                group += names
            elif name.isidentifier():
                group.append(name)
            elif name != "1":
                return None
        found.append(group)
    return found


class _Spelling:
    """The lengths of the axes of one pattern, as they become known."""

    def __init__(self, emit: Emitter, lengths: dict[str, Any]) -> None:
        self.emit = emit
        self.lengths: dict[str, Length] = dict(lengths)

    def spell(self, tensor: Node, left: list[Group], right: list[Group]) -> Node | None:
        """Emit reshape, permute, expand and reshape, each where it does something."""
        before, after = ([name for group in side for name in group] for side in (left, right))
        new = [name for name in after if name not in before]
        if len(set(before)) < len(before) or len(set(after)) < len(after):
            return None
        if set(before) - set(after) or any(name not in self.lengths for name in new):
            return None
        if not all(self._learn(tensor, axis, group) for axis, group in enumerate(left)):
            return None
        if any(len(group) != 1 for group in left):
            tensor = self.emit.method("reshape", tensor, *(self.lengths[n] for n in before))
        order = [before.index(name) for name in after if name in before]
        if order != sorted(order):
            tensor = self.emit.method("permute", tensor, *order)
        for place, name in enumerate(after):
            if name in new:
                tensor = self.emit.method("unsqueeze", tensor, place)
        if new:
            wide = (self.lengths[name] if name in new else -1 for name in after)
            tensor = self.emit.method("expand", tensor, *wide)
        if any(len(group) != 1 for group in right):
            tensor = self.emit.method("reshape", tensor, *map(self._product, right))
        return tensor

    def _learn(self, tensor: Node, axis: int, group: Group) -> bool:
        """Find the length that a group does not say; at most one."""
        size = value(tensor).shape[axis]
        unknown = [name for name in group if name not in self.lengths]
        if not group:
            return known_true(size == 1)
        if len(unknown) > 1:
            return False
        known = [name for name in group if name in self.lengths]
        if not unknown:
            product = math.prod(value(self.lengths[name]) for name in known)
            return known_true(product == size)
        whole = self.emit.size(size, tensor, axis)
        for name in known:
            length = self.lengths[name]
            if isinstance(whole, int) and isinstance(length, int):
                whole //= length
            else:
                whole = self.emit(operator.floordiv, whole, length)
        self.lengths[unknown[0]] = whole
        return True

    def _product(self, group: Group) -> Length:
        product: Length = 1
        for name in group:
            length = self.lengths[name]
            if isinstance(product, int) and isinstance(length, int):
                product *= length
            else:
                product = length if product == 1 else self.emit(operator.mul, product, length)
        return product
