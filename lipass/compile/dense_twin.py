r"""Run a graph without what leaves keys out, in chunks where nothing is left to leave out.

Where a session has chosen a short context, no mask drops a latent and no block is skipped; the
operators of the passes then only stand between attention and what the inner compiler would have
fused with it. So such graphs are compiled twice::

    Dynamo's graph --- all passes ------------------> rewritten --- chunks with keys to leave out
                  \-- those that leave nothing out --> twin ------- all other chunks, and counted
                                                                   as `rewritten` would be

`why_dense` chooses for a chunk. The counts come from the sparse calls of the rewritten graph,
which are described once (`_Call`), and from the sizes of the arguments of the run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch.fx import GraphModule

from lipass.compile.argument_sizes import ArgumentSizes, Bindings, number
from lipass.kernels import registry
from lipass.passes.attention.sparse_call import SparseCall
from lipass.passes.core import Pass, PassPipeline
from lipass.passes.graph.compat import value
from lipass.passes.graph.marks import region_name
from lipass.passes.graph.names import names_of
from lipass.policy.blocks import roles_that_stay_sparse
from lipass.runtime.chunk import Chunk
from lipass.runtime.scope import current_step

Compiled = Callable[..., Any]

_EVERY_KEY = "every key of the chosen context is visited"


@dataclass(frozen=True)
class _Call:
    """One attention call of the rewritten graph, for the counts."""

    names: tuple[str, ...]
    role: str
    budget: float
    masked: bool
    """Whether a mask may drop latents."""
    in_step: bool
    """Whether it is part of an outlined step, which may be reused."""
    blocks: Callable[[Bindings], int]


def pipeline_of_twin(pipeline: PassPipeline) -> PassPipeline | None:
    """Return the passes of the twin, or None where none of them leaves keys out."""
    if not any(one.leaves_out for one in pipeline):
        return None
    kept: dict[str, Pass] = {}
    for one in pipeline:
        if one.in_dense_twin and not one.leaves_out and kept.keys() >= set(one.requires):
            kept[one.name] = one
    return PassPipeline(tuple(kept.values()))


class DenseTwin:
    """Stand in for a rewritten graph where it would visit every key, and count as it would.

    Attributes:
        compiled: the graph as the model wrote it, equal layers and steps outlined.
    """

    def __init__(self, compiled: Compiled, rewritten: GraphModule) -> None:
        self.compiled = compiled
        self._calls = [_describe(node, in_step) for node, in_step in _operators(rewritten)]
        self._sizes = ArgumentSizes(rewritten.graph)
        steps = rewritten.graph.find_nodes(op="call_module")
        self._steps = sum(region_name(node) is not None for node in steps)

    def why_dense(self, chunk: Chunk, short: str | None) -> str | None:
        """Say why the rewritten graph would visit every key in this chunk, or return None.

        Args:
            chunk: that the call belongs to.
            short: why its context is too short for the graph, or None.
        """
        if not chunk.chooses and any(call.masked for call in self._calls):
            return None
        if all(call.budget == 1.0 for call in self._calls):
            return _EVERY_KEY
        sparse = roles_that_stay_sparse(chunk.session.config)
        if all(call.role in sparse for call in self._calls):
            return None
        return chunk.plan.dense_reason or short

    def run(self, args: tuple[Any, ...], chunk: Chunk, reason: str) -> Any:
        """Run the model's own attention and count it."""
        outputs = self.compiled(*args)
        sizes = self._sizes(args)
        computed = self._steps
        if self._steps and current_step() is None:
            computed -= len(chunk.step_plan(self._steps).reused)
        for call in self._calls:
            blocks = call.blocks(sizes)
            for name in call.names * (computed if call.in_step else 1):
                registry.record_call(
                    name,
                    role=call.role,
                    provider="sdpa",
                    visited=blocks,
                    total=blocks,
                    kept_dense=reason,
                )
        return outputs


def leaves_out(gm: GraphModule) -> bool:
    """Whether passes have put in a call that may leave keys out."""
    return next(_operators(gm), None) is not None


def _operators(gm: GraphModule) -> Iterator[tuple[torch.fx.Node, bool]]:
    """List the sparse calls of a rewritten graph, and whether they are part of a step."""
    steps = {str(n.target) for n in gm.graph.find_nodes(op="call_module") if region_name(n)}
    for path, module in gm.named_modules():
        if isinstance(module, GraphModule):
            for node in SparseCall.nodes(module.graph):
                yield node, path.partition(".")[0] in steps


def _describe(node: torch.fx.Node, in_step: bool) -> _Call:
    call = SparseCall.of(node)
    batch, heads = value(call.q).shape[:2]

    @functools.lru_cache(maxsize=64)
    def blocks(sizes: Bindings) -> int:
        known = dict(sizes)
        layout, grid = call.layout(lambda size: number(size, known))
        return number(batch, known) * number(heads, known) * grid.blocks * layout.blocks

    names, masked = tuple(names_of(call.site)), call.keep_frames is not None
    return _Call(names, call.role, call.budget, masked, in_step, blocks)
