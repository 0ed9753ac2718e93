"""Read, change and insert calls of `lipass::sparse_attention`; nobody else knows its arguments."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.fx import Graph, Node

# The import registers the operator.
import lipass.kernels.ops  # noqa: F401
from lipass.kernels.call import resolve_layout
from lipass.kernels.nearest.plan import in_rows
from lipass.kernels.plan import BlockGrid, KvLayout
from lipass.passes.attention import joint, latent_mask
from lipass.passes.attention.match import Operands
from lipass.passes.attention.site import AttentionSite, move_site
from lipass.passes.core import PassContext
from lipass.passes.graph.arguments import arguments, overload_of, set_arguments, spelled
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.emit import Emitter

_OPERATOR = torch.ops.lipass.sparse_attention.default


@dataclass(frozen=True)
class SparseCall:
    """One call of the operator, by the names of its schema; what they mean is said there.

    Grids hold ints or nodes of sizes; `roles` is a tuple here and comma separated there.
    """

    q: Node
    k: tuple[Node, ...]
    v: tuple[Node, ...]
    q_grid: tuple[int | Node, ...]
    kv_grids: tuple[int | Node, ...]
    roles: tuple[str, ...]
    tile: tuple[int, ...]
    budget: float
    scale: float
    sink_latents: int
    role: str
    keep_frames: Node | None
    site: str
    history_means: Node | None = None
    key_bias: Node | None = None
    planner: str = "mean"
    blocks: Node | None = None
    block_counts: Node | None = None
    latent_mask: Node | None = None
    history_order: Node | None = None
    history_basis: Node | None = None
    tile_order: str = ""

    @staticmethod
    def is_one(node: Node) -> bool:
        """Whether a node calls the operator."""
        return node.op == "call_function" and overload_of(node.target) is _OPERATOR

    @staticmethod
    def nodes(graph: Graph) -> list[Node]:
        """List the calls of a graph in order."""
        return [node for node in graph.nodes if SparseCall.is_one(node)]

    @classmethod
    def of(cls, node: Node) -> SparseCall:
        """Read a call."""
        given = arguments(node)
        lists = {name: tuple(given[name]) for name in ("k", "v", "q_grid", "kv_grids", "tile")}
        return cls(**given | lists | {"roles": tuple(given["roles"].split(","))})

    def write(self, node: Node) -> None:
        """Make a call this one."""
        set_arguments(node, **self._named())

    def emit(self, emit: Emitter) -> Node:
        """Insert the call."""
        args, kwargs = spelled(_OPERATOR, self._named())
        return emit(_OPERATOR, *args, **kwargs)

    @property
    def history(self) -> Node | None:
        """Keys of the history, in decode."""
        if self.role != "decode" or "history" not in self.roles:
            return None
        return self.k[self.roles.index("history")]

    def layout(self, size_of: Any) -> tuple[KvLayout, BlockGrid]:
        """Build the layout of keys and the grid of queries.

        Args:
            size_of: makes an int of a size `int | torch.SymInt`.
        """
        grids = (self.q_grid, self.kv_grids)
        q_grid, kv_grids = (tuple([size_of(value(n)) for n in sizes]) for sizes in grids)
        roles = ",".join(self.roles)
        layout, grid = resolve_layout(q_grid, kv_grids, roles, self.tile, self.tile_order)
        return in_rows(layout, grid) if self.planner == "buckets" else (layout, grid)

    def sink(self, size_of: Any) -> int:
        """Return how many leading frames of the candidates in `layout` are always visited."""
        if self.planner != "buckets":
            return self.sink_latents
        at = 3 * self.roles.index("history")
        y, x = (size_of(value(n)) for n in self.kv_grids[at + 1 : at + 3])
        return self.sink_latents * int(y) * int(x)

    def _named(self) -> dict[str, Any]:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        lists = {name: list(x) for name, x in given.items() if isinstance(x, tuple)}
        return given | lists | {"roles": ",".join(self.roles)}


def replace_attention(
    node: Node,
    site: AttentionSite,
    operands: Operands,
    ctx: PassContext,
    *,
    tile: tuple[int, ...],
    budget: float,
    sink_latents: int,
    keep_frames: Node | None,
    planner: str = "mean",
) -> None:
    """Put a sparse call in place of an attention call and move its fact along."""
    assert site.q_grid is not None
    emit = Emitter(node, ctx)
    cut = None
    if site.latents_first is not None:
        cut = joint.cut(node, operands, site, emit)
        operands = cut.latents
    kv_grids: list[int | Node] = []
    for key, segment in zip(operands.keys, site.segments, strict=True):
        if segment.role == "text":
            kv_grids += [1, 1, emit.size(segment.tokens, key, 2)]
        else:
            kv_grids += emit.grid(segment.grid, key)
    k, v = (
        tuple(_heads_of_q(piece, operands.groups, emit) for piece in pieces)
        for pieces in (operands.keys, operands.values)
    )
    row, shown = (None, operands.mask) if site.latent_mask else (operands.mask, None)
    made = SparseCall(
        q=operands.q,
        k=k,
        v=v,
        q_grid=tuple(emit.grid(site.q_grid, operands.q)),
        kv_grids=tuple(kv_grids),
        roles=tuple(segment.role for segment in site.segments),
        tile=tile,
        budget=budget,
        scale=site.scale,
        sink_latents=sink_latents,
        role=site.role,
        keep_frames=keep_frames,
        site=site.name,
        key_bias=None if row is None else _bias(row, emit),
        planner=planner,
        latent_mask=None if shown is None else latent_mask.latents_of(shown, site, ctx),
    ).emit(emit)
    move_site(site, made)
    node.replace_all_uses_with(made if cut is None else cut.joined(made, emit))
    node.graph.erase_node(node)


def _bias(mask: Node, emit: Emitter) -> Node:
    """Make what is added to scores, `[B or 1, H or 1, Lk]`, of a mask `[.., 1, Lk]`.

    A mask of more rows has equal ones.
    """
    if not known_true(value(mask).shape[2] == 1):
        mask = emit(operator.getitem, mask, (slice(None), slice(None), slice(0, 1)))
    row = emit.method("squeeze", mask, 2)
    if value(mask).dtype != torch.bool:
        return emit.method("float", row)
    shown = emit(torch.zeros_like, row, dtype=torch.float32)
    hidden = emit.method("logical_not", row)
    return emit.method("masked_fill", shown, hidden, float("-inf"))


def _heads_of_q(piece: Node, groups: int, emit: Emitter) -> Node:
    """Repeat the heads of keys that are shared by groups of heads of q."""
    return piece if groups == 1 else emit.method("repeat_interleave", piece, groups, 1)
