"""Put tokens in the order of tiles once, at the model's input, so that blocks are runs of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

# The import registers the operator that the pass inserts.
import lipass.kernels.tile_order  # noqa: F401
from lipass.passes.attention.sparse_call import SparseCall
from lipass.passes.attention.token_flow import Flow, Stopped, follow
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.compat import hint, known_true, value
from lipass.passes.graph.emit import Emitter
from lipass.passes.graph.marks import set_step, step_of
from lipass.passes.graph.ops import is_other_look, is_pointwise, name_of
from lipass.passes.graph.token_order import Clip, Kept, Tokens, through
from lipass.passes.graph.writes import storage

WHEN = ("off", "whole", "runs")


@dataclass(frozen=True)
class TileOrder(Pass):
    """Order tokens tile by tile between the calls that make them of a grid and back.

    ::

        %x = flatten(%patches, 2)                                  # [B, C, T, Y, X] -> [B, C, L]
        %o = lipass.sparse_attention(%q, [%k], .., [4, 8, 4], 0.3, ..)
        %grid = reshape(%y, [B, T, Y, X, C])

        %order = lipass.tile_order([T, Y, X], [4, 8, 4], False, 'cuda');  %back = ..(.., True, ..)
        %x = index_select(flatten(%patches, 2), 2, %order)
        %o = lipass.sparse_attention(%q, [%k], .., [4, 8, 4], 0.3, .., tile_order='current')
        %grid = reshape(index_select(%y, 1, %back), [B, T, Y, X, C])

    A block is then a run of tokens, which kernels of others take as it lies. Tables of positions,
    rays and levels that meet tokens are put in order once, where they are made. A history that the
    graph is given stays as it is: only its blocks are tiles.

    With `runs` a tile may hang over the grid: a block that would be short goes on with tokens of
    the next tile, so that no slot is empty but in the last. Which keys a block at a border holds
    changes with that, and nothing else; where every block is visited, nothing does.

    Keeps the graph as it is, naming the call, where tokens do not keep their order from patches to
    patches: a convolution or a sum along them, shifted windows, an index of places, tokens joined
    with text, a reshape into the grid in between, keys that are returned or written to a cache,
    tokens that are returned as such, biases of keys, query tiles. Tiles of several latents mix
    those, so what is computed by latents (views, levels that are broadcast) needs tiles of one.
    """

    name: ClassVar[str] = "tile-order"
    numerics: ClassVar[Numerics] = Numerics.REORDERED
    requires: ClassVar[tuple[str, ...]] = ("sparse-attention",)
    precedes: ClassVar[tuple[str, ...]] = ("guard-steps", "hoist-calls", "share-blocks")
    section: ClassVar[str | None] = "sparse"
    in_dense_twin: ClassVar[bool] = False

    grids: str = "off"
    """Which grids: `whole` ones, which tiles divide, or any, cut into `runs`; `off` is none."""

    verify: bool = True
    """Make each form of call between patches on a few tokens in two orders."""

    def __post_init__(self) -> None:
        if self.grids not in WHEN:
            raise ValueError(
                f"grids must be one of {', '.join(WHEN)}, got {self.grids!r}; use 'off'"
            )

    @classmethod
    def options_from(cls, options: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        if not options.get("sparse"):
            return {}
        verify = options.get("verify", "first") == "first"
        return {"grids": options["sparse.tile_order"], "verify": verify}

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        calls = SparseCall.nodes(graph)
        if self.grids == "off" or not calls:
            return False
        try:
            flow = follow(graph, runs=self.grids == "runs", verify=self.verify)
        except Stopped as why:
            ctx.note("tokens", "kept", str(why))
            return False
        before = _slots(calls)
        _Rewrite(graph, ctx, flow).apply()
        said = f"{before:.2f} to {_slots(calls):.2f}"
        count = "1 call" if len(calls) == 1 else f"{len(calls)} calls"
        ctx.note("tokens", "rewritten", f"in tile order for {count}: slots a useful pair {said}")
        return True


def _slots(calls: list[Node]) -> float:
    """Return how many pairs of slots are computed for a pair of tokens where all are visited."""
    slots = pairs = 0
    for node in calls:
        layout, q_grid = SparseCall.of(node).layout(hint)
        slots += q_grid.blocks * q_grid.block_tokens * layout.blocks * layout.block_tokens
        pairs += q_grid.tokens * layout.tokens
    return slots / max(pairs, 1)


@dataclass
class _Rewrite:
    """Insert the orders and what is put in them."""

    graph: Graph
    ctx: PassContext
    flow: Flow
    orders: dict[tuple[Clip, bool, bool], Node] = field(default_factory=dict)
    made: dict[tuple[Node, Tokens], Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = next(node for node in self.graph.nodes if node.op != "placeholder")

    def apply(self) -> None:
        flow = self.flow
        begins = {node: self._put(node, tokens) for node, tokens in flow.begins.items()}
        for node, moved in begins.items():
            node.replace_all_uses_with(moved, functools.partial(operator.is_not, moved))
        for user, operand, tokens in flow.enters:
            user.replace_input_with(operand, self._entering(operand, tokens))
        for user, operand, tokens in flow.leaves:
            now = begins.get(operand, operand)
            order = self._order(tokens, value(now).device, back=True)
            back = Emitter(user, self.ctx)(torch.index_select, now, tokens.axis, order)
            user.replace_input_with(now, back)
        for node, roles in flow.calls.items():
            replace(SparseCall.of(node), tile_order=",".join(roles)).write(node)

    def _order(self, tokens: Tokens, device: torch.device, *, back: bool = False) -> Node:
        """Return the index that puts an axis of tokens in order, or back."""
        key = (*tokens.order, back)
        if key not in self.orders:
            emit = Emitter(self.start, self.ctx, inside=False)
            (t, y, x), (step, *rest) = tokens.clip.grid, tokens.clip.tile
            latents: int | Node | None = t if isinstance(t, int) else emit.symbol(str(t))
            if not tokens.whole:
                latents, step = 1, 1
            self.orders[key] = emit(
                torch.ops.lipass.tile_order.default,
                [latents, int(y), int(x)],
                [step, *rest],
                back,
                device,
            )
        return self.orders[key]

    def _put(self, tensor: Node, tokens: Tokens) -> Node:
        """Put an axis of a tensor in order, where the tensor is made."""
        order = self._order(tokens, value(tensor).device)
        made = self._behind(tensor)(torch.index_select, tensor, tokens.axis, order)
        return _beside(tensor, made)

    def _entering(self, tensor: Node, tokens: Tokens) -> Node:
        """Put a table in order in front of what is done to each of its numbers.

        Each layer takes its own look at one table of positions.
        """
        if (tensor, tokens) not in self.made:
            above = _table(tensor, tokens)
            if above is None or storage(value(above[0])) in self.flow.written:
                made = self._put(tensor, tokens)
            else:
                table, at = above[0], self._entering(*above)
                args, kwargs = map_arg(
                    (tensor.args, tensor.kwargs), lambda one: at if one is table else one
                )
                made = _beside(tensor, self._behind(tensor).like(tensor, args, kwargs))
            self.made[tensor, tokens] = made
        return self.made[tensor, tokens]

    def _behind(self, tensor: Node) -> Emitter:
        place = self.start if tensor.op == "placeholder" else tensor.next
        return Emitter(place, self.ctx, inside=False)


def _beside(tensor: Node, made: Node) -> Node:
    """Let what is made of a tensor belong to the module and the step of the tensor."""
    for key in {"nn_module_stack", "stack_trace"} & tensor.meta.keys():
        made.meta[key] = tensor.meta[key]
    if step := step_of(tensor):
        set_step(made, step)
    return made


def _table(look: Node, tokens: Tokens) -> tuple[Node, Tokens] | None:
    """Return what a call looks at or computes each number of, and where it has the tokens."""
    is_look = is_other_look(look) or name_of(look) in ("getitem", "chunk", "split", "unbind")
    if not (is_look or is_pointwise(look)) or len(look.all_input_nodes) != 1:
        return None
    (table,) = look.all_input_nodes
    found = value(table)
    shape = (found[0] if isinstance(found, (tuple, list)) else found).shape
    for whole in (tokens.whole, not tokens.whole):
        for axis, size in enumerate(shape):
            at = Tokens(tokens.clip, axis, whole)
            fits = known_true(size == at.size) and (whole or tokens.clip.stays_in_latents)
            if fits and through(look, {table: at}) == Kept(tokens, {}):
                return table, at
    return None
