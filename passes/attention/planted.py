"""Describe sparse calls that were in the graph before any pass: those of `lipass.attend`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from lipass.passes.attention.operators import is_attention
from lipass.passes.attention.site import AttentionSite, Grid, KeySegment, set_site, site_of
from lipass.passes.attention.sparse_call import SparseCall
from lipass.passes.core import PassContext
from lipass.passes.graph.arguments import arguments
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import value
from lipass.passes.graph.names import call_line

_SAID = "said by the call"
_LSE = torch.ops.lipass.sparse_attention_lse.default


def other_calls(graph: Graph) -> list[Node]:
    """List attention that is no planted call: of declared operators, and what has a fact."""
    return [
        node
        for node in graph.nodes
        if not _is_planted(node) and (is_attention(node) or site_of(node))
    ]


def describe_planted(graph: Graph, ctx: PassContext) -> None:
    """Attach the sites that planted calls spell: roles and grids need no rules there."""
    for node in graph.nodes:
        if not _is_planted(node) or site_of(node) is not None:
            continue
        if is_call(node, _LSE):
            given = arguments(node)
            reason = "its log-sum-exp is used, so it visits every block"
            site = AttentionSite(
                given["site"], call_line(node), "other", None, (), given["scale"], reason
            )
        else:
            site = _site(node, SparseCall.of(node))
        set_site(node, site)
        ctx.note(site.name, "found", f"{site.role}: {site.reason}")


def _is_planted(node: Node) -> bool:
    return SparseCall.is_one(node) or is_call(node, _LSE)


def _site(node: Node, call: SparseCall) -> AttentionSite:
    grids = [_grid(call.kv_grids[n : n + 3]) for n in range(0, len(call.kv_grids), 3)]
    segments = tuple(
        KeySegment(role, value(key).shape[2], grid, _SAID)
        for role, key, grid in zip(call.roles, call.k, grids, strict=True)
    )
    return AttentionSite(
        call.site,
        call_line(node),
        call.role,
        _grid(call.q_grid),
        segments,
        call.scale,
        _SAID,
        _SAID,
    )


def _grid(sizes: tuple[Any, ...]) -> Grid:
    t, y, x = map(value, sizes)
    return (t, y, x)
