"""Follow tokens from where a grid becomes them to where they become a grid again."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from lipass.passes.attention import token_grid
from lipass.passes.attention.match import Refusal
from lipass.passes.attention.sparse_call import SparseCall
from lipass.passes.attention.token_grid import Merge
from lipass.passes.graph.compat import Size, divides, hint, known_true, value
from lipass.passes.graph.marks import step_of
from lipass.passes.graph.names import module_path
from lipass.passes.graph.ops import reads
from lipass.passes.graph.primitives import frozen
from lipass.passes.graph.token_order import Clip, Kept, Tokens, through
from lipass.passes.graph.try_order import differs
from lipass.passes.graph.writes import memory_written, storage


class Stopped(Exception):
    """Report that tokens cannot be in another order, and why."""


@dataclass
class Flow:
    """Hold what has to be done so that tokens are in tile order between two places."""

    begins: dict[Node, Tokens] = field(default_factory=dict)
    """Calls that make tokens of a grid."""
    enters: list[tuple[Node, Node, Tokens]] = field(default_factory=list)
    """Calls, and operands of theirs that have to be put in order."""
    leaves: list[tuple[Node, Node, Tokens]] = field(default_factory=list)
    """Calls that make a grid of tokens, and those tokens."""
    calls: dict[Node, tuple[str, ...]] = field(default_factory=dict)
    """Sparse calls, and the roles of their keys that are in order."""
    written: set[int] = field(default_factory=set)
    """Memory that the graph writes to."""


def follow(graph: Graph, *, runs: bool, verify: bool) -> Flow:
    """Follow the tokens of all sparse calls of a graph through the whole of it.

    Args:
        graph: that has sparse calls.
        runs: whether tiles may hang over a grid; blocks at its borders then hold other tokens.
        verify: make each form of call once on a few tokens in two orders.

    Raises:
        Stopped: naming the call at which they cannot be followed.
    """
    follower = _Follower(graph, _beginnings(graph, runs), verify)
    for node in graph.nodes:
        follower.visit(node)
    return follower.flow


def _beginnings(graph: Graph, runs: bool) -> dict[Node, Tokens]:
    """Find the calls that make the tokens of queries of a grid."""
    found: dict[Node, Tokens] = {}
    clips: list[tuple[Merge, Clip]] = []
    for node in SparseCall.nodes(graph):
        call = SparseCall.of(node)
        if why := _unfit(call):
            raise Stopped(f"{call.site}: {why}")
        merge = token_grid.merge(call.q, value(call.q).shape[2])
        if isinstance(merge, Refusal):
            raise Stopped(f"{call.site}: {merge.reason}")
        if merge.node in found:
            continue
        tile = (call.tile[0], call.tile[1], call.tile[2])
        clip = next((c for m, c in clips if c.tile == tile and m.same_order(merge)), None)
        if clip is None:
            clip = Clip(merge.grid, tile)
            if why := _unfit_grid(clip, runs):
                raise Stopped(f"{call.site}: {why}")
            clips.append((merge, clip))
        above = value(merge.node.all_input_nodes[0]).dim()
        at_once = above - value(merge.node).dim() == 2
        axis = merge.axes[0] if at_once else merge.axes[1]
        found[merge.node] = Tokens(clip, axis, at_once or known_true(merge.grid[0] == 1))
    return found


def _unfit(call: SparseCall) -> str:
    """Say what of a call takes tokens as they lie, or nothing."""
    if call.tile[:3] != call.tile[-3:]:
        return "queries have tiles of their own, and tokens can lie in one order only"
    if call.planner in ("given", "buckets"):
        return f"planner {call.planner!r} says which tokens a block holds"
    if call.key_bias is not None:
        return "its scores get a bias for each key, by its place"
    return ""


def _unfit_grid(clip: Clip, runs: bool) -> str:
    grid, tile = clip.grid, clip.tile
    if not all(isinstance(size, int) for size in grid[1:]):
        return "height and width of its latents vary"
    if isinstance(grid[0], torch.SymInt) and not grid[0].node.expr.is_symbol:
        return "the number of its latents is computed in the graph"
    rest = [n for n, step in zip(grid, tile, strict=True) if not known_true(divides(step, n))]
    shown = f"({', '.join(map(str, grid))})"
    if rest and not runs:
        return (
            f"tiles {tile} do not divide the grid {shown}, and blocks at its borders would hold "
            "other tokens; sparse.tile_order='runs' allows that"
        )
    wide = tile[2] >= hint(grid[2])
    if tile[0] == 1 and (tile[1] == 1 or wide):
        return f"tokens of {shown} lie in the order of tiles {tile} already"
    return ""


@dataclass
class _Follower:
    graph: Graph
    begins: dict[Node, Tokens]
    verify: bool
    at: dict[Node, Tokens] = field(default_factory=dict)
    flow: Flow = field(default_factory=Flow)
    behind: dict[Node, Node] = field(default_factory=dict)
    """What is computed from tokens that have left, and the call at which they did."""
    tried: dict[object, str | None] = field(default_factory=dict)
    """Forms of calls, and how they differ in another order."""

    def __post_init__(self) -> None:
        self.flow.written = {at for node in self.graph.nodes for at in memory_written(node)}

    def visit(self, node: Node) -> None:
        """Follow tokens through the next call of the graph."""
        above = node.all_input_nodes
        if left := next((self.behind[one] for one in above if one in self.behind), None):
            self.behind[node] = left
        moved = [one for one in above if one in self.at]
        if node in self.begins:
            if moved:
                raise Stopped(f"%{node.name} makes tokens of tokens")
            self._must_be_new(node, node)
            self.at[node] = self.begins[node]
            self.flow.begins[node] = self.begins[node]
        elif not moved:
            return
        elif node.op == "output":
            raise Stopped(self._returned(moved[0]))
        elif SparseCall.is_one(node):
            self._attend(node)
        else:
            self._through(node, moved)

    def _through(self, node: Node, moved: list[Node]) -> None:
        found = through(node, self.at)
        why = found if isinstance(found, str) else self._wrong(node, found)
        if isinstance(found, str) or why:
            path = module_path(node)
            raise Stopped(f"{why}" + (f", in {path}" if path else ""))
        if found.leaves:
            self.flow.leaves.append((node, moved[0], self.at[moved[0]]))
            self._not_written(moved[0], node, node)
        for operand, tokens in found.enter.items():
            self._must_be_new(operand, node)
            self.flow.enters.append((node, operand, tokens))
        if found.tokens is not None:
            self.at[node] = found.tokens
        elif any(one in self.at for one in reads(node)):
            self.behind[node] = node

    def _wrong(self, node: Node, kept: Kept) -> str | None:
        """Say how a call differs where its tokens come in another order; once for each form."""
        if not self.verify:
            return None
        try:
            places = [
                (self.at[x].axis, self.at[x].whole) for x in node.all_input_nodes if x in self.at
            ]
            form = (node.op, node.target, frozen(node.args), frozen(node.kwargs), tuple(places))
            if form not in self.tried:
                self.tried[form] = differs(node, self.at, kept)
        except TypeError:  # an argument that cannot be hashed
            return differs(node, self.at, kept)
        return self.tried[form]

    def _must_be_new(self, operand: Node, user: Node) -> None:
        """Refuse to put in order what was computed from tokens that were in order before."""
        left = self.behind.get(operand)
        if left is not None and step_of(left) == step_of(user):
            raise Stopped(
                f"tokens leave at %{left.name} and come back at %{user.name}: they would be moved "
                "in each layer"
            )
        self._not_written(operand, user, operand)

    def _not_written(self, operand: Node, user: Node, since: Node) -> None:
        """Refuse to read a copy of what somebody writes to behind a call."""
        memory, node = storage(value(operand)), since
        if memory not in self.flow.written:
            return
        while node.op != "output" and memory not in memory_written(node):
            node = node.next
        if node.op != "output":
            raise Stopped(f"%{operand.name}, which %{user.name} reads, is written to")

    def _attend(self, node: Node) -> None:
        call = SparseCall.of(node)
        q = self.at.get(call.q)
        if q is None or q.axis != 2 or not q.whole:
            raise Stopped(f"{call.site}: its queries are not one row of all tokens")
        roles = []
        for number, (role, k, v) in enumerate(zip(call.roles, call.k, call.v, strict=True)):
            found = self.at.get(k), self.at.get(v)
            if found == (None, None):
                continue
            grid = call.kv_grids[3 * number : 3 * number + 3]
            if found[0] != found[1] or found[0] is None or not _is_of(found[0], grid):
                raise Stopped(f"{call.site}: its keys and values of {role} lie in another order")
            roles.append(role)
        if "current" not in roles or self.at[call.k[call.roles.index("current")]] != q:
            raise Stopped(f"{call.site}: its own keys lie in another order than its queries")
        if call.latent_mask is not None and not _cut_by_latents(q.clip):
            raise Stopped(f"{call.site}: a mask over latents needs blocks of one latent")
        used = {call.q, *call.k, *call.v}
        others = [x for x in node.all_input_nodes if x in self.at and x not in used]
        if others:
            raise Stopped(f"{call.site}: %{others[0].name} is no key and no query")
        self.flow.calls[node] = tuple(roles)
        self.at[node] = q

    def _returned(self, tokens: Node) -> str:
        keys = [
            one
            for call in map(SparseCall.of, SparseCall.nodes(self.graph))
            for one in (*call.k, *call.v)
        ]
        memory = {storage(value(one)) for one in keys}
        if tokens in keys or storage(value(tokens)) in memory:
            return f"%{tokens.name} is returned: a cache keeps the order of the model"
        return f"%{tokens.name} is returned as tokens, which are not cut into a grid again"


def _is_of(tokens: Tokens, grid: tuple[Size | Node, ...]) -> bool:
    """Whether an axis 2 holds the tokens of a grid in the order of tiles."""
    same = (known_true(value(a) == b) for a, b in zip(grid, tokens.clip.grid, strict=True))
    return tokens.axis == 2 and tokens.whole and all(same)


def _cut_by_latents(clip: Clip) -> bool:
    slots = clip.tile[0] * clip.tile[1] * clip.tile[2]
    return clip.tile[0] == 1 and known_true(divides(slots, clip.grid[1] * clip.grid[2]))
