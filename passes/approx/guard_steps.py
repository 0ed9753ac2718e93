"""Turn each denoising step into a region that may be skipped at run time, compiled once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from lipass.passes.attention.match import Refusal
from lipass.passes.attention.overwritten import overwrites
from lipass.passes.attention.site import rename_site, sites
from lipass.passes.attention.step_inputs import returns_latents, step_inputs
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.frame import source_name
from lipass.passes.graph.marks import StepInputs, set_region, set_step_inputs, step_of
from lipass.passes.graph.names import without_repeat
from lipass.passes.graph.outline import body_of, foreign, put_calls
from lipass.passes.graph.region import (
    Region,
    alias,
    alias_between,
    difference,
    impurity,
    interruption,
    region_of,
)

STEP_MODULE = "denoise_step"


@dataclass(frozen=True)
class GuardSteps(Pass):
    """Outline the repeats of a denoising step; the unit calls each behind a guard.

    Unrolled loop::

        %v = <model>(%x, %sigma, ..);    %x_1 = add(%x, mul(-0.1, %v))
        %v_1 = <model>(%x_1, %sigma_1, ..)

        %step_0 = denoise_step(%x, %sigma, ..);   %x_1 = add(%x, mul(-0.1, getitem(%step_0, 0)))
        %step_1 = denoise_step(%x_1, %sigma_1, ..)

    Loop in Python: a graph with decode sites and a noise level is one step, and so is one in which
    all frames attend to each other, if it returns latents like those it gets; the whole call is
    marked as the region and no node changes. A graph may be both: inside of a loop over
    `Chunk.steps` its own is not guarded, as the slopes of Heun's rule are not steps.

    The guard returns the outputs of the last computed step instead of computing; with the Euler
    rule that is exactly the shorter list of sigmas.

    A call may write to a slice of a cache, if the next step writes over it before it is read: what
    the last computed step wrote stands then, as its output does.

    Keeps: steps that write to their inputs otherwise or draw random numbers; steps whose outputs
    share memory with an input or each other; steps that are used before they are complete;
    functions that change what lies outside of the graph, which a skipped call would not change;
    graphs without decode and self sites; calls that are no whole function, or have no noise level.
    """

    name: ClassVar[str] = "guard-steps"
    numerics: ClassVar[Numerics] = Numerics.APPROX
    requires: ClassVar[tuple[str, ...]] = ("find-attention", "find-steps")
    section: ClassVar[str | None] = "steps"

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        members: dict[int, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            if step := step_of(node):
                members[step.index].append(node)
        whole = _guard_call(graph, ctx)
        regions = [region_of(members[i]) for i in sorted(members)]
        changed = bool(regions) and self._guard_loop(graph, regions, ctx)
        if isinstance(whole, StepInputs):
            where = ", where the loop is in Python" if members else ""
            ctx.note("call", "rewritten", f"the whole call is one step behind a guard{where}")
        elif not members:
            ctx.note("call", "kept", whole.reason)
        return changed

    def _guard_loop(self, graph: Graph, regions: list[Region], ctx: PassContext) -> bool:
        if why := _outside(ctx) or _refusal(graph, regions):
            ctx.note("steps", "kept", why)
            return False
        _outline(graph, regions, ctx)
        ctx.note("steps", "rewritten", f"{len(regions)} steps call one module behind a guard")
        return True


def _guard_call(graph: Graph, ctx: PassContext) -> StepInputs | Refusal:
    """Mark the whole call as the region, where it is one denoising step."""
    roles = {site.role for _, site in sites(graph)}
    if "decode" not in roles and ("self" not in roles or "prefill" in roles):
        return Refusal("it has no decode or self site, so it is no denoising step")
    if not ctx.frame.is_whole:
        return Refusal("a graph break cuts it: part would be reused, part computed")
    nodes = tuple(graph.nodes)
    inputs = tuple(node for node in nodes if node.op == "placeholder")
    outputs = tuple(graph.output_node().all_input_nodes)
    whole = Region(nodes, inputs, outputs, ())
    again = overwrites(whole)
    if why := impurity(whole, again) or alias(whole) or alias_between(whole):
        return Refusal(f"it is not pure: {why}")
    if why := _outside(ctx):
        return Refusal(why)
    given = step_inputs(graph)
    if isinstance(given, StepInputs) and "decode" not in roles and not returns_latents(graph):
        return Refusal(
            "it returns nothing of the shape of its latents, so it is no denoising step"
        )
    if isinstance(given, StepInputs):
        watched = {inputs[i] for i in given.conditions}
        if unseen := next((node for node in again.values() if node not in watched), None):
            return Refusal(f"it writes to {source_name(unseen)}, which may be its latents")
    if isinstance(given, StepInputs):
        set_region(graph.output_node(), "call")
        set_step_inputs(graph.output_node(), given)
    return given


def _outside(ctx: PassContext) -> str | None:
    if not ctx.frame.changes:
        return None
    return f"it is not pure: a skipped call would not change {', '.join(ctx.frame.changes)}"


def _refusal(graph: Graph, regions: list[Region]) -> str | None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    for i, region in enumerate(regions):
        if why := impurity(region) or alias(region) or alias_between(region):
            return f"step {i} is not pure: {why}"
        if i and (why := difference(regions[0], region)):
            return f"steps 0 and {i} differ: {why}"
        if why := foreign(region) or interruption(region, order):
            return f"step {i} cannot be outlined: {why}"
    return None


def _outline(graph: Graph, regions: list[Region], ctx: PassContext) -> None:
    body = body_of(regions, ctx)
    _drop_repeats(body.module.graph)
    body.module.recompile()
    graph.owning_module.add_module(STEP_MODULE, body.module)

    def call(index: int, args: list[Node]) -> Node:
        made = graph.call_module(STEP_MODULE, tuple(args))
        set_region(made, f"step {index}")
        return made

    put_calls(graph, regions, body, call)


def _drop_repeats(body: Graph) -> None:
    """Name the sites of the body without the number of the call, because all calls share them."""
    for node, site in sites(body):
        rename_site(node, site, without_repeat(site.name))
