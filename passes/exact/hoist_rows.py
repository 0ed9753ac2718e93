"""Compute rows before they are repeated: products on one row a latent instead of one a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.compat import value
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.names import module_path
from lipass.passes.graph.ops import is_product
from lipass.passes.graph.repeats import Moved, Repeat, moved, repeat_of
from lipass.passes.graph.writes import memory_written, storage


@dataclass(frozen=True)
class HoistRows(Pass):
    """Move a repetition of rows behind the calls that treat each row by itself.

    ::

        %rows = repeat_interleave(%level, 880, 1)       # [B, T, C] -> [B, T * Y * X, C]
        %modulation = linear(silu(%rows), $w, $b);      %shift, %scale = chunk(%modulation, 2, -1)

        %modulation = linear(silu(%level), $w, $b);     %shift, %scale = chunk(%modulation, 2, -1)
        %shift = repeat_interleave(%shift, 880, 1);     %scale = repeat_interleave(%scale, 880, 1)

    The repetitions behind are read where tokens are computed anyway, and cost nothing there.

    Keeps: repetitions that no matrix product follows; calls that mix rows, draw random numbers or
    take one that differs from token to token; rows that somebody writes to.
    """

    name: ClassVar[str] = "hoist-rows"
    numerics: ClassVar[Numerics] = Numerics.REORDERED
    precedes: ClassVar[tuple[str, ...]] = ("guard-steps", "share-blocks")

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        changed = False
        for node in ctx.visit(list(graph.nodes)):
            repeat = repeat_of(node) if node.users else None
            if repeat is None or repeat.times == 1:
                continue
            calls = _calls_on_rows(node, repeat)
            products = [call for call in calls if is_product(call)]
            if not products:
                ctx.note(_place(node), "kept", "no product follows the repeated rows")
                continue
            if why := _written(node, (repeat.rows, node, *calls)):
                ctx.note(_place(node), "kept", why)
                continue
            _move(node, repeat, calls, ctx)
            count = f"{len(products)} products" if len(products) > 1 else "1 product"
            said = f"{count} on 1 row instead of {repeat.times}"
            ctx.note(_place(products[0]), "rewritten", said)
            changed = True
        return changed


def _calls_on_rows(node: Node, repeat: Repeat) -> dict[Node, Moved]:
    """Collect what can be computed on the rows alone, in the order of the graph."""
    dims, calls = {node: repeat.dim}, {}
    current = node.next
    while current.op != "output":
        if any(above in dims for above in current.all_input_nodes):
            found = moved(current, dims)
            if found is not None:
                dims[current] = found.dim
                calls[current] = found
        current = current.next
    return calls


def _written(node: Node, rows: tuple[Node, ...]) -> str | None:
    """Say who writes, behind the repetition, to rows or what is computed from them, or None."""
    memory = {storage(value(one)) for one in rows} - {None}
    current = node.next
    while current.op != "output":
        if memory_written(current) & memory:
            return f"%{current.name} writes to the repeated rows"
        current = current.next
    return None


def _move(node: Node, repeat: Repeat, calls: dict[Node, Moved], ctx: PassContext) -> None:
    """Compute every call on rows, and repeat what somebody reads token by token."""
    emit = Emitter(node, ctx)
    source = repeat.rows
    if repeat.flat:
        source = emit.method("flatten", source, *repeat.flat)
    rows = {node: source}
    for call, found in calls.items():
        emit = Emitter(call, ctx)
        made = emit.like(call, *_on_rows(found, rows))
        rows[call] = made
        outside = [user for user in call.users if user not in calls]
        if outside:
            tokens = emit.method("repeat_interleave", made, repeat.times, found.dim)
            call.replace_all_uses_with(tokens, lambda user: user not in calls)
    for call in reversed(calls):
        node.graph.erase_node(call)
    if not node.users:
        node.graph.erase_node(node)


def _on_rows(found: Moved, rows: dict[Node, Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def row(node: Node) -> Node:
        return rows.get(node, node)

    return map_arg(found.args, row), map_arg(found.kwargs, row)


def _place(node: Node) -> str:
    return module_path(node) or node.name
