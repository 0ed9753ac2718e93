"""Find the denoising loop where a graph holds it unrolled."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.region import Region, difference, region_of
from lipass.passes.site import Step, set_step


@dataclass(frozen=True)
class FindSteps(Pass):
    """Attach a `Step` to every node of a repeated model call that is a denoising step.

    ::

        %v = <model>(%x, %sigma, ..)            step 0 of 2
        %x_1 = add(%x, mul(-0.1, %v))
        %v_1 = <model>(%x_1, %sigma_1, ..)      step 1 of 2

    Dynamo marks the calls of one module `@1, @2, ...`. Consecutive calls are steps if they are
    isomorphic (same operations, same constants, inputs of the same shapes) and each continues from
    the one before: one of its inputs is computed, outside the calls, from both the output of the
    call before and the input in the same place there (`x + c * v`).

    Keeps: calls with other constants or shapes, such as the prefill in front of the loop; calls
    that do not continue from one another, such as the two branches of classifier-free guidance or
    a block whose weights are shared.
    """

    name: ClassVar[str] = "find-steps"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        refusals = []
        for calls in _repeated_calls(graph):
            for run in _isomorphic_runs(calls):
                if why := _broken_chain(run):
                    refusals.append(why)
                    continue
                for index, region in enumerate(run):
                    for node in region.nodes:
                        set_step(node, Step(index, len(run)))
                where = f"calls {_name(run[0])} to {_name(run[-1])}"
                ctx.note("steps", "found", f"{len(run)} steps: {where} of {len(calls)}")
                return False
            reasons = [difference(a, b) for a, b in itertools.pairwise(calls)]
            refusals += [f"calls of {_name(calls[0])}: {why}" for why in reasons[:1] if why]
        ctx.note("steps", "kept", "; ".join(refusals) or "no module call is repeated")
        return False


def _repeated_calls(graph: Graph) -> list[list[Region]]:
    """Group the outermost module calls by module, in order; only modules called more than once."""
    calls: dict[str, dict[str, list[Node]]] = defaultdict(lambda: defaultdict(list))
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack and node.op.startswith("call"):
            key = next(iter(stack))
            calls[key.partition("@")[0]][key].append(node)
    return [
        [region_of(nodes) for nodes in group.values()]
        for group in calls.values()
        if len(group) > 1
    ]


def _isomorphic_runs(calls: list[Region]) -> list[list[Region]]:
    """Cut a list of calls into maximal runs of isomorphic ones; runs of one are left out."""
    runs: list[list[Region]] = []
    for region in calls:
        if runs and difference(runs[-1][-1], region) is None:
            runs[-1].append(region)
        else:
            runs.append([region])
    return sorted((run for run in runs if len(run) > 1), key=len, reverse=True)


def _broken_chain(run: list[Region]) -> str | None:
    """Say which call does not continue from the one before, or return None."""
    inside = {node for region in run for node in region.nodes}
    for a, b in itertools.pairwise(run):
        if not any(
            mine is not theirs and _computed_from(theirs, mine, a.outputs, inside)
            for mine, theirs in zip(a.inputs, b.inputs, strict=True)
        ):
            return f"call {_name(b)} does not continue from {_name(a)}"
    return None


def _computed_from(node: Node, x: Node, outputs: tuple[Node, ...], inside: set[Node]) -> bool:
    """Whether `node` is computed outside the calls from `x` and one of `outputs`."""
    seen, todo = {node}, [node]
    while todo:
        current = todo.pop()
        if current in inside or current is x:
            continue
        todo += [above for above in current.all_input_nodes if above not in seen]
        seen.update(current.all_input_nodes)
    return x in seen and node is not x and any(output in seen for output in outputs)


def _name(region: Region) -> str:
    """Name a call by its repeat, such as `@1`."""
    _, at, repeat = next(iter(region.nodes[0].meta["nn_module_stack"])).partition("@")
    return f"@{repeat}" if at else "@0"
