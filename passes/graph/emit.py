"""Insert nodes whose metadata is true from the start."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Node
from torch.fx.node import map_arg

from lipass.passes.attention.site import AttentionSite, Grid
from lipass.passes.core import PassContext
from lipass.passes.graph.compat import (
    Size,
    hint,
    known_true,
    sizes_of,
    unguarded,
    value,
    why_no_guard,
)
from lipass.passes.graph.marks import set_step, step_of
from lipass.passes.graph.modes import entered, inside
from lipass.passes.graph.settings import chosen_kernel
from lipass.passes.graph.writes import is_rewritten, writers_of


@dataclass(frozen=True)
class Emitter:
    """Insert calls in front of a node and compute their fake values."""

    before: Node
    ctx: PassContext
    inside: bool = True
    """Whether the calls belong to the module and the step of `before`."""

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert one call."""
        with self.before.graph.inserting_before(self.before):
            node = self.before.graph.call_function(target, args, kwargs)
        return self._describe(node, lambda given, named: target(*given, **named))

    def method(self, name: str, tensor: Node, *args: Any) -> Node:
        """Insert a call of a method of a tensor."""
        with self.before.graph.inserting_before(self.before):
            node = self.before.graph.call_method(name, (tensor, *args))
        return self._describe(node, lambda given, _: getattr(given[0], name)(*given[1:]))

    def like(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """Insert the call of another node with other arguments."""
        with self.before.graph.inserting_before(self.before):
            made = self.before.graph.create_node(node.op, node.target, args, kwargs)
        if node.op == "call_method":
            name = str(node.target)
            return self._describe(
                made, lambda given, named: getattr(given[0], name)(*given[1:], **named)
            )
        target: Any = node.target
        return self._describe(made, lambda given, named: target(*given, **named))

    def _describe(self, node: Node, run: Callable[..., Any]) -> Node:
        if self.inside:
            for key in {"nn_module_stack", "stack_trace"} & self.before.meta.keys():
                node.meta[key] = self.before.meta[key]
            if step := step_of(self.before):
                set_step(node, step)
        mode = self.ctx.fake_mode
        # What takes the place of a call that is differentiated is differentiated too.
        grad = torch.set_grad_enabled(_is_differentiated(self.before))
        with inside(entered(self.before)), mode, unguarded(mode), grad:
            node.meta["example_value"] = run(
                map_arg(node.args, value), map_arg(node.kwargs, value)
            )
        return node

    def size(self, size: Size, tensor: Node, dim: int) -> int | Node:
        """Return a size as a constant or a node; `tensor` has it as its axis `dim`."""
        return size if isinstance(size, int) else self.given(size) or self._axis(tensor, dim)

    def grid(self, grid: Grid, tensor: Node) -> list[int | Node]:
        """Return `(T, Y, X)` as constants or nodes; `tensor` `[B, H, T*Y*X, D]` has the tokens."""
        # the graph was specialised on the height and width of a latent, or it is now
        t, y, x = grid[0], int(grid[1]), int(grid[2])
        if isinstance(t, int):
            return [t, y, x]
        if node := self.given(t):
            return [node, y, x]
        return [self(operator.floordiv, self._axis(tensor, 2), y * x), y, x]

    def given(self, size: Size) -> Node | None:
        """Return the input of the graph that is this size, if there is one."""
        for node in self.before.graph.find_nodes(op="placeholder"):
            if isinstance(value(node), torch.SymInt) and known_true(value(node) == size):
                found: Node = node
                return found
        return None

    def symbol(self, name: str) -> Node | None:
        """Return a node of the size of this name: an input, or the axis of an input."""
        for node in self.before.graph.find_nodes(op="placeholder"):
            if isinstance(value(node), torch.SymInt) and str(value(node)) == name:
                found: Node = node
                return found
        for node in self.before.graph.find_nodes(op="placeholder"):
            for axis, size in enumerate(sizes_of(value(node))):
                if str(size) == name:
                    return self._axis(node, axis)
        return None

    def _axis(self, tensor: Node, dim: int) -> Node:
        return self(torch.ops.aten.sym_size.int, tensor, dim)


def _is_differentiated(node: Node) -> bool:
    leaves = pytree.tree_leaves(value(node))
    return any(isinstance(one, torch.Tensor) and one.requires_grad for one in leaves)


def emit_behind(tensor: Node, ctx: PassContext, target: Callable[..., Any], *given: Any) -> Node:
    """Insert a call where a tensor is made and written, unless it stands there already.

    An equal call anywhere else may come behind what asks, or in front of a write.
    """
    place = max([tensor, *writers_of(tensor)]).next
    while place.op == "placeholder":
        place = place.next
    behind, one = {tensor, *(size for size in given if isinstance(size, Node))}, place
    while one.op.startswith("call") and behind.issuperset(one.all_input_nodes):
        equal = one.target is target and one.args == (tensor, *given) and not one.kwargs
        if equal and not is_rewritten(one):
            return one
        behind.add(one)
        one = one.next
    made = Emitter(place, ctx, inside=False)(target, tensor, *given)
    for key in {"nn_module_stack", "stack_trace"} & tensor.meta.keys():
        made.meta[key] = tensor.meta[key]
    if step := step_of(tensor):
        set_step(made, step)
    return made


def refuse_rewrite(node: Node) -> str | None:
    """Say why no other kernel may take the place of an attention call, or None.

    The user chose the one that runs, or it is differentiated, which ours cannot be.
    """
    if value(node).requires_grad:
        return "its gradient is recorded; call the model under torch.no_grad()"
    return chosen_kernel(node)


def refuse_grid(site: AttentionSite) -> str | None:
    """Say that a latent may vary in height or width, which a sparse call needs fixed, or None."""
    assert site.q_grid is not None
    for size in site.q_grid[1:]:
        if why := why_no_guard(size == hint(size)):
            return f"height and width of a latent must be fixed: {why}"
    return None
