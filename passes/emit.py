"""Insert nodes whose metadata is true from the start."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Argument, map_arg

from lipass.passes.compat import Size, known_true, unguarded, value
from lipass.passes.core import PassContext
from lipass.passes.match import Operands
from lipass.passes.site import AttentionSite, Grid, set_site


def emit(
    before: Node, ctx: PassContext, target: Callable[..., Any], *args: Argument, **kwargs: Argument
) -> Node:
    """Insert a call in front of `before`, as part of its module, and compute its fake value."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    for key in ("nn_module_stack", "stack_trace"):
        if key in before.meta:
            node.meta[key] = before.meta[key]
    with ctx.fake_mode, unguarded(ctx.fake_mode), torch.no_grad():
        node.meta["example_value"] = target(*map_arg(args, value), **map_arg(kwargs, value))
    return node


def size_node(size: Size, tensor: Node, dim: int, before: Node, ctx: PassContext) -> int | Node:
    """Return a size as a constant or as a node; `tensor` has it as its axis `dim`."""
    if isinstance(size, int):
        return size
    for node in before.graph.find_nodes(op="placeholder"):
        if isinstance(value(node), torch.SymInt) and known_true(value(node) == size):
            return node
    return emit(before, ctx, torch.ops.aten.sym_size.int, tensor, dim)


def grid_nodes(grid: Grid, tensor: Node, before: Node, ctx: PassContext) -> list[int | Node]:
    """Return `(T, Y, X)` as constants or nodes; `tensor` `[B, H, T*Y*X, D]` has the tokens."""
    t, y, x = grid
    if isinstance(t, int):
        return [t, _plain(y), _plain(x)]
    tokens = size_node(value(tensor).shape[2], tensor, 2, before, ctx)
    if (y, x) == (1, 1):
        return [tokens, 1, 1]
    for node in before.graph.find_nodes(op="placeholder"):
        if isinstance(value(node), torch.SymInt) and known_true(value(node) == t):
            return [node, _plain(y), _plain(x)]
    latents = emit(before, ctx, operator.floordiv, tokens, _plain(y) * _plain(x))
    return [latents, _plain(y), _plain(x)]


def _plain(size: Size) -> int:
    """Return the height or width of a latent, which the graph specialises on."""
    return int(size)


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
) -> Node:
    """Put `lipass::sparse_attention` in place of an attention call and move its fact along."""
    assert site.q_grid is not None
    q_grid = grid_nodes(site.q_grid, operands.q, node, ctx)
    kv_grids: list[int | Node] = []
    for key, segment in zip(operands.keys, site.segments, strict=True):
        if segment.role == "text":
            kv_grids += [1, 1, size_node(segment.tokens, key, 2, node, ctx)]
        else:
            kv_grids += grid_nodes(segment.grid, key, node, ctx)
    call = emit(
        node,
        ctx,
        torch.ops.lipass.sparse_attention.default,
        operands.q,
        list(operands.keys),
        list(operands.values),
        q_grid,
        kv_grids,
        ",".join(segment.role for segment in site.segments),
        list(tile),
        budget,
        site.scale,
        sink_latents,
        site.role,
        keep_frames,
        site.name,
    )
    node.replace_all_uses_with(call)
    set_site(call, site)
    node.graph.erase_node(node)
    return call
