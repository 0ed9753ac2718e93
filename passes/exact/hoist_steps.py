"""Compute once what every denoising step computes alike: cameras, tables, projected text."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from lipass.passes.attention.site import site_of
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.compat import value
from lipass.passes.graph.marks import clear_step, step_of
from lipass.passes.graph.region import Region, difference, impurity, region_of
from lipass.passes.graph.worth import worth_once
from lipass.passes.graph.writes import memory_written, mutates, storage, writes_between


@dataclass(frozen=True)
class HoistSteps(Pass):
    """Take what does not depend on the step out of an unrolled denoising loop.

    ::

        %rays = rays(%w2c);    %v = head(cat(%x, %rays), %sigma)          step 0 of 2
        %rays_1 = rays(%w2c);  %v_1 = head(cat(%x_1, %rays_1), %sigma_1)  step 1 of 2

        %rays = rays(%w2c)
        %v = head(cat(%x, %rays), %sigma);  %v_1 = head(cat(%x_1, %rays), %sigma_1)

    The first step always computes, so nothing runs that did not run before.

    Keeps: views, which cost nothing; calls that write, draw random numbers or whose result is
    written to; attention; steps that write to their inputs.
    """

    name: ClassVar[str] = "hoist-steps"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    requires: ClassVar[tuple[str, ...]] = ("find-steps",)
    precedes: ClassVar[tuple[str, ...]] = ("guard-steps",)

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        members: dict[int, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            if step := step_of(node):
                members[step.index].append(node)
        regions = [region_of(members[i]) for i in sorted(members)]
        if not regions:
            return False
        if why := _refusal(regions):
            ctx.note("steps", "kept", why)
            return False
        alike = _worth_once(regions[0], _alike(regions))
        if not alike:
            ctx.note("steps", "kept", "every computation depends on the step")
            return False
        for position in alike:
            node = regions[0].nodes[position]
            clear_step(node)
            for region in regions[1:]:
                region.nodes[position].replace_all_uses_with(node)
        for region in regions[1:]:
            for position in reversed(alike):
                graph.erase_node(region.nodes[position])
        count = f"{len(alike)} of {len(regions[0].nodes)} calls"
        ctx.note("steps", "rewritten", f"{count} run once instead of {len(regions)} times")
        return True


def _refusal(regions: list[Region]) -> str | None:
    for i, region in enumerate(regions):
        if why := impurity(region):
            return f"step {i} is not pure: {why}"
        if i and (why := difference(regions[0], region)):
            return f"steps 0 and {i} differ: {why}"
    return None


def _alike(regions: list[Region]) -> list[int]:
    """Return the positions of the calls that every step makes with the same arguments."""
    first, written = regions[0], _written(regions[0].nodes[0], regions[-1].nodes[-1])
    same: set[Node] = set()
    for column in zip(*(region.inputs for region in regions), strict=True):
        if all(node is column[0] for node in column) and storage(value(column[0])) not in written:
            same.add(column[0])
    found = []
    for position, node in enumerate(first.nodes):
        if not all(above in same for above in node.all_input_nodes):
            continue
        if mutates(node) or storage(value(node)) in written or site_of(node) is not None:
            continue
        same.add(node)
        found.append(position)
    return found


def _written(first: Node, last: Node) -> set[int]:
    """Collect the memory that is written to while the loop runs."""
    writers = (*writes_between(first, last), first, last)
    return {at for node in writers for at in memory_written(node)}


def _worth_once(region: Region, positions: list[int]) -> list[int]:
    chosen = {region.nodes[p]: p for p in positions}
    return [chosen[node] for node in worth_once(list(chosen))]
