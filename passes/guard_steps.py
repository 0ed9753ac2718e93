"""Turn each denoising step into a region that may be skipped at run time, compiled once."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from lipass.passes.compat import known_true, value
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.match import writes_between
from lipass.passes.region import Region, alias, difference, impurity, region_of, to_module
from lipass.passes.site import set_region, set_site, sites, step_of, without_repeat

STEP_MODULE = "denoise_step"


@dataclass(frozen=True)
class GuardSteps(Pass):
    """Outline the repeats of a denoising step; the unit calls each behind a guard.

    Unrolled loop::

        %v = <model>(%x, %sigma, ..);    %x_1 = add(%x, mul(-0.1, %v))
        %v_1 = <model>(%x_1, %sigma_1, ..)

        %step_0 = denoise_step(%x, %sigma, ..);   %x_1 = add(%x, mul(-0.1, getitem(%step_0, 0)))
        %step_1 = denoise_step(%x_1, %sigma_1, ..)

    Loop in Python: a graph with decode sites is one step; the whole call is marked as the region
    and no node changes.

    The guard returns the outputs of the last computed step instead of computing; with the Euler
    rule that is exactly the shorter list of sigmas.

    Keeps: steps that write to their inputs or draw random numbers, steps whose outputs share
    memory with an input, steps that are used before they are complete, graphs without decode
    sites.
    """

    name: ClassVar[str] = "guard-steps"
    numerics: ClassVar[Numerics] = Numerics.APPROX
    requires: ClassVar[tuple[str, ...]] = ("find-attention", "find-steps")

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        members: dict[int, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            if step := step_of(node):
                members[step.index].append(node)
        if not members:
            _guard_call(graph, ctx)
            return False
        regions = [region_of(members[i]) for i in sorted(members)]
        if why := _refusal(graph, regions):
            ctx.note("steps", "kept", why)
            return False
        _outline(graph, regions, ctx)
        ctx.note("steps", "rewritten", f"{len(regions)} steps call one module behind a guard")
        return True


def _guard_call(graph: Graph, ctx: PassContext) -> None:
    """Mark the whole call as the region, where it is one denoising step."""
    if not any(site.role == "decode" for _, site in sites(graph)):
        ctx.note("call", "kept", "it has no decode site, so it is no denoising step")
        return
    nodes = tuple(graph.nodes)
    inputs = tuple(node for node in nodes if node.op == "placeholder")
    outputs = tuple(graph.output_node().all_input_nodes)
    whole = Region(nodes, inputs, outputs, ())
    if why := impurity(whole) or alias(whole):
        ctx.note("call", "kept", f"it is not pure: {why}")
        return
    set_region(graph.output_node(), "call")
    ctx.note("call", "rewritten", "the whole call is one denoising step behind a guard")


def _refusal(graph: Graph, regions: list[Region]) -> str | None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    for i, region in enumerate(regions):
        if why := impurity(region) or alias(region):
            return f"step {i} is not pure: {why}"
        if i and (why := difference(regions[0], region)):
            return f"steps 0 and {i} differ: {why}"
        last = max(order[node] for node in region.nodes)
        inside = set(region.nodes)
        users = [user for node in region.outputs for user in node.users if user not in inside]
        if late := [
            n for n in writes_between(region.nodes[0], region.nodes[-1]) if n not in inside
        ]:
            return f"step {i} is interrupted by %{late[0].name}, which writes to its input"
        if early := [user for user in users if order[user] < last]:
            return f"step {i} is used by %{early[0].name} before it is complete"
    return None


def _outline(graph: Graph, regions: list[Region], ctx: PassContext) -> None:
    positions = sorted({r.nodes.index(node) for r in regions for node in r.outputs})
    columns = list(zip(*(region.inputs for region in regions), strict=True))
    inputs = [_equal_strides(list(column), regions, ctx) for column in columns]
    body = to_module(regions[0], positions)
    for node, column in zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["example_value"] = value(column[0])
    _drop_repeats(body.graph)
    body.recompile()
    graph.owning_module.add_module(STEP_MODULE, body)
    replaced: dict[Node, Node] = {}
    for i, region in enumerate(regions):
        args = tuple(replaced.get(column[i], column[i]) for column in inputs)
        replaced |= _call(graph, region, positions, args, i)


def _drop_repeats(body: Graph) -> None:
    """Name the sites of the body without the number of the call, because all calls share them."""
    for node, site in sites(body):
        name = without_repeat(site.name)
        node.args = tuple(name if arg == site.name else arg for arg in node.args)
        set_site(node, replace(site, name=name))


def _call(
    graph: Graph, region: Region, positions: list[int], args: tuple[Node, ...], index: int
) -> dict[Node, Node]:
    """Put one call of the body behind the last node of a region and erase the region.

    Returns the outputs that took the place of nodes of the region.
    """
    replaced = {}
    with graph.inserting_before(region.nodes[-1].next):
        call = graph.call_module(STEP_MODULE, args)
        call.meta["example_value"] = tuple(value(region.nodes[p]) for p in positions)
        set_region(call, f"step {index}")
        for i, position in enumerate(positions):
            node = region.nodes[position]
            result = graph.call_function(operator.getitem, (call, i))
            result.meta["example_value"] = value(node)
            node.replace_all_uses_with(result, lambda user: user not in region.nodes)
            replaced[node] = result
    for node in reversed(region.nodes):
        graph.erase_node(node)
    return replaced


def _equal_strides(column: list[Node], regions: list[Region], ctx: PassContext) -> list[Node]:
    """Return one input of all steps with equal strides, as a body compiled once needs them."""
    tensors = [value(node) for node in column]
    if not isinstance(tensors[0], torch.Tensor) or all(
        _same_strides(tensors[0], t) for t in tensors
    ):
        return column
    return [
        _contiguous(node, region.nodes[0], ctx)
        for node, region in zip(column, regions, strict=True)
    ]


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    return all(known_true(x == y) for x, y in zip(a.stride(), b.stride(), strict=True))


def _contiguous(node: Node, before: Node, ctx: PassContext) -> Node:
    with before.graph.inserting_before(before):
        copy = before.graph.call_method("contiguous", (node,))
    with ctx.fake_mode:
        copy.meta["example_value"] = value(node).contiguous()
    return copy
