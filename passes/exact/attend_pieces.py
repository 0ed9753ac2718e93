"""Attend to the pieces of a concatenation where they lie, instead of copying them together."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, Node

# The import registers the operator that the pass inserts.
import lipass.kernels.pieces  # noqa: F401
from lipass.passes.attention import match
from lipass.passes.attention.cache_pieces import is_cut
from lipass.passes.attention.match import Operands, Refusal
from lipass.passes.attention.site import SDPA, move_site, sites
from lipass.passes.core import Gate, Numerics, Pass, PassContext
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import hint, value
from lipass.passes.graph.emit import Emitter, refuse_rewrite


@dataclass(frozen=True)
class AttendPieces(Pass):
    """Call `lipass::attend_pieces` where dense attention reads joined keys.

    ::

        %key = cat([%text_k, %hist_k, %k], 2);  %value = cat([%text_v, %hist_v, %v], 2)
        %o = scaled_dot_product_attention(%q, %key, %value)

        %o = lipass.attend_pieces(%q, [%text_k, %hist_k, %k], [%text_v, %hist_v, %v], 0.125, ..)

    The operator joins them after all where that is predicted to be faster for its sizes.

    Keeps: calls that are predicted to be faster with joined keys at the sizes that are being
    compiled; sites that another pass made sparse; keys in one piece or in more than three; grouped
    heads; devices other than CPUs; calls whose gradient is recorded or whose kernel was chosen.
    """

    name: ClassVar[str] = "attend-pieces"
    numerics: ClassVar[Numerics] = Numerics.REORDERED
    requires: ClassVar[tuple[str, ...]] = ("find-attention",)
    precedes: ClassVar[tuple[str, ...]] = ("guard-steps", "share-blocks")
    rewrites_attention: ClassVar[bool] = True
    in_dense_twin: ClassVar[bool] = False

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        changed = False
        # One answer for calls of one form: on a busy machine measurements differ from call to
        # call, and steps of a loop must stay alike.
        gate = ctx.gate and functools.cache(ctx.gate)
        for node, site in sites(graph):
            if not is_call(node, SDPA):
                continue
            ctx.failing = node
            operands = match.attention(node)
            if why := _refusal(node, operands, gate):
                ctx.note(site.name, "kept", why)
                continue
            assert isinstance(operands, Operands)
            call = Emitter(node, ctx)(
                torch.ops.lipass.attend_pieces.default,
                operands.q,
                list(operands.keys),
                list(operands.values),
                operands.scale,
                site.name,
            )
            move_site(site, call)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            ctx.note(site.name, "rewritten", f"dense over {len(operands.keys)} pieces of keys")
            changed = True
        ctx.failing = None
        return changed


def _refusal(node: Node, operands: Operands | Refusal, gate: Gate | None) -> str | None:
    if isinstance(operands, Refusal):
        return operands.reason
    if is_cut(operands, node):
        return "its keys lie in a cache, in one piece"
    if operands.groups > 1:
        return "heads of k and v are shared by groups of q"
    if why := refuse_rewrite(node):
        return why
    if gate is None:
        return "nothing is known of this machine's speed"
    q = value(operands.q)
    tokens = tuple(hint(value(key).shape[2]) for key in operands.keys)
    return gate(tuple(map(hint, q.shape)), q.dtype, q.device, tokens)
