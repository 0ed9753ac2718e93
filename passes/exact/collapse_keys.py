"""Merge the equal keys of a padded prompt into one of their common weight, with zero error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, Node

# The import registers the operators that the pass inserts.
import lipass.kernels.distinct  # noqa: F401
from lipass.passes.attention import match
from lipass.passes.attention.match import Operands, Refusal
from lipass.passes.attention.site import SDPA, move_site, sites
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.calls import is_call
from lipass.passes.graph.compat import value
from lipass.passes.graph.emit import Emitter, refuse_rewrite


@dataclass(frozen=True)
class CollapseKeys(Pass):
    """Attend to the distinct keys of a prompt, and to its padding as one key of bias `log m`.

    ::

        %o = scaled_dot_product_attention(%q, %k, %v)

        %distinct = lipass.distinct_keys(%k, %v)
        %o = lipass.attend_distinct(%q, %k, %v, %distinct, 0.125, 'blocks.0.cross')

    How many keys are equal is counted where the graph runs, so one graph serves all prompts,
    padded or not; `hoist-steps` and `hoist-calls` then count once a prompt.

    Keeps: sites other than cross-attention; fewer keys than `keys_min`; fp64; heads of k that
    heads of q share; devices other than CPUs; calls whose gradient is recorded or whose kernel
    was chosen.
    """

    name: ClassVar[str] = "collapse-keys"
    numerics: ClassVar[Numerics] = Numerics.REORDERED
    requires: ClassVar[tuple[str, ...]] = ("find-attention",)
    precedes: ClassVar[tuple[str, ...]] = ("hoist-steps", "hoist-calls", "share-blocks")
    rewrites_attention: ClassVar[bool] = True

    keys_min: int = 64
    """Fewest keys that are looked at: prompts are padded to hundreds, of fewer little is saved."""

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        changed = False
        for node, site in sites(graph):
            if site.role != "cross" or not is_call(node, SDPA):
                continue
            ctx.failing = node
            operands = match.attention(node)
            if why := self._refusal(node, operands):
                ctx.note(site.name, "kept", why)
                continue
            assert isinstance(operands, Operands)
            emit = Emitter(node, ctx)
            (k,), (v,) = operands.keys, operands.values
            distinct = emit(torch.ops.lipass.distinct_keys.default, k, v)
            call = emit(
                torch.ops.lipass.attend_distinct.default,
                operands.q,
                k,
                v,
                distinct,
                operands.scale,
                site.name,
            )
            move_site(site, call)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            ctx.note(site.name, "rewritten", "equal keys at the end of the prompt count once")
            changed = True
        ctx.failing = None
        return changed

    def _refusal(self, node: Node, operands: Operands | Refusal) -> str | None:
        if isinstance(operands, Refusal):
            return operands.reason
        if len(operands.keys) > 1:
            return f"its keys are {len(operands.keys)} pieces"
        keys = value(operands.keys[0])
        if keys.device.type != "cpu":
            return f"equal keys are merged on a CPU, got {keys.device.type}"
        if not isinstance(keys.shape[2], int) or keys.shape[2] < self.keys_min:
            return f"{keys.shape[2]} keys, padded prompts have {self.keys_min} or more"
        if keys.dtype is torch.float64:
            return "equal keys are weighed in fp32, got torch.float64"
        if operands.groups > 1:
            return "heads of k and v are shared by groups of q"
        return refuse_rewrite(node)
