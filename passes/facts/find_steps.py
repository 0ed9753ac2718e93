"""Find the denoising loop where a graph holds it unrolled.

::

    calls of one module    @0   @1   @2   @3   @4   @5        as Dynamo marks them
    regions                r0   r1   r2   r3   r4   r5        nodes, inputs, outputs of each
    size 1                 r0 ? r1 ? r2 ? r3 ? r4 ? r5        prefill r0 differs: run r1 .. r5
    size 2                 (r0 r1) ? (r2 r3) ? (r4 r5)        if no run of size 1 holds
                                   |
                      isomorphic, another level, and continues: _updated or _noised

`_Loop` holds the regions; `runs` tries sizes in order; `refusals` says where the chain breaks.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import networkx as nx
import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from lipass.passes.attention.step_inputs import is_level, is_lookup, level_counts
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.compat import hint, value
from lipass.passes.graph.marks import StepMark, set_step
from lipass.passes.graph.ops import draws, flops
from lipass.passes.graph.region import Region, difference, region_of
from lipass.passes.graph.writes import memory_written, storage, writes_between

# Heun's rule under classifier-free guidance, each branch a call of its own.
_CALLS_MAX = 4

GoingOn = Callable[[Region, Region], list[Node]]


@dataclass(frozen=True)
class FindSteps(Pass):
    """Attach a `StepMark` to every node of a repeated model call that is a denoising step.

    ::

        %v = <model>(%x, %sigma, ..)            step 0 of 2
        %x_1 = add(%x, mul(-0.1, %v))
        %v_1 = <model>(%x_1, %sigma_1, ..)      step 1 of 2

    Dynamo marks the calls of one module `@1, @2, ...`. A step is one of them, or the same few in
    each step: the branches of classifier-free guidance, or the slopes of Heun's rule with what
    lies between. Consecutive ones are steps if they are isomorphic (same operations, same
    constants, inputs of the same shapes) and each continues from the one before. One of its inputs
    is computed, outside the calls, from an output of the step before and

    - the input in the same place there, before it was scaled or copied (`x + c * v`; multistep
      rules read older outputs too), or
    - a tensor of its size that no call has made, while another input, the noise level, comes from
      outside (`x0 + sigma * noise`).

    Another input, the noise level, comes from outside the calls and differs from step to step: one
    number a sample, frame or token, or what is computed from it. Nothing else from outside does.

    Keeps: calls with other constants or shapes, such as the prefill in front of the loop; calls
    that do not continue from one another or have no noise level, such as a block whose weights
    are shared over depth; calls that differ in text, cameras, frames or embeddings of their own;
    what layers have made, such as the tokens of a refiner.
    """

    name: ClassVar[str] = "find-steps"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        refusals = []
        for calls in _repeated_calls(graph):
            loop = _Loop(graph, calls)
            run = next(loop.runs(), None)
            if run is None:
                refusals += loop.refusals()
                continue
            for index, step in enumerate(run):
                for node in step.region.nodes:
                    set_step(node, StepMark(index, len(run)))
            size = run[0].last - run[0].first + 1
            where = f"calls {_name(calls[run[0].first])} to {_name(calls[run[-1].last])}"
            each = f", {size} a step" if size > 1 else ""
            ctx.note("steps", "found", f"{len(run)} steps: {where} of {len(calls)}{each}")
            return False
        ctx.note("steps", "kept", "; ".join(refusals) or "no module call is repeated")
        return False


def _repeated_calls(graph: Graph) -> list[list[list[Node]]]:
    """Group the outermost module calls by module, in order; only modules called more than once."""
    calls: dict[str, dict[str, list[Node]]] = defaultdict(lambda: defaultdict(list))
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack and node.op.startswith("call"):
            key = next(iter(stack))
            calls[key.partition("@")[0]][key].append(node)
    return [list(group.values()) for group in calls.values() if len(group) > 1]


class _Candidate(NamedTuple):
    """What may be a step: the calls from `first` to `last`, and what lies between."""

    region: Region
    first: int
    last: int


class _Loop:
    """The calls of one module, and the arithmetic around them."""

    def __init__(self, graph: Graph, calls: list[list[Node]]) -> None:
        self.calls = calls
        self.regions = [region_of(nodes) for nodes in calls]
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        inside = {node for nodes in calls for node in nodes}
        # What is computed from what without another call.
        self.around = nx.DiGraph()
        self.around.add_nodes_from(graph.nodes)
        outside = [node for node in graph.nodes if node not in inside]
        self.around.add_edges_from((x, node) for node in outside for x in node.all_input_nodes)
        outputs = {node for region in self.regions for node in region.outputs}
        self.made = self._below(outputs) | outputs
        last = [node for node in self.regions[-1].inputs if node in self.made]
        self.counts = level_counts(graph, max(last, key=_elements)) if last else {1}

    def runs(self) -> Iterator[list[_Candidate]]:
        """Iterate over runs of steps, those of the fewest calls first."""
        sizes = range(1, min(_CALLS_MAX, len(self.calls) // 2) + 1)
        for run in (run for size in sizes for run in self._isomorphic(size)):
            if any(self._is_loop(run, going_on) for going_on in (self._updated, self._noised)):
                yield run

    def _is_loop(self, run: list[_Candidate], going_on: GoingOn) -> bool:
        if _broken(run, going_on) is not None:
            return False
        return not self._are_made_by_layers(going_on(run[0].region, run[1].region))

    def refusals(self) -> list[str]:
        """Say why the single calls are no steps."""
        refusals: list[str] = []
        for run in self._isomorphic(1):
            if (at := _broken(run, self._updated)) is not None:
                refusals.append(self._refusal(at))
            elif not self._is_loop(run, self._updated):
                name = _name(self.calls[run[0].first])
                refusals.append(f"what call {name} is given is made by layers and no sampler's")
        why = next(
            filter(None, itertools.starmap(difference, itertools.pairwise(self.regions))), ""
        )
        return refusals + ([f"calls of {_name(self.calls[0])}: {why}"] if why else [])

    def _refusal(self, at: int) -> str:
        said = f"call {_name(self.calls[at])} does not continue from {_name(self.calls[at - 1])}"
        memory = {storage(value(node)) for node in self.regions[at].inputs}
        for node in writes_between(self.calls[at - 1][-1], self.calls[at][0]):
            if memory_written(node) & memory:
                return f"{said}: %{node.name} writes to its input in place; write `x = x + ..`"
        given = self._given_anew(self.regions[at - 1], self.regions[at])
        if not given:
            return f"{said}: they have no noise level in which they differ"
        other = [pair[1].name for pair in given if not self._are_levels(*pair)]
        return f"{said}: they differ in %{other[0]}, which is no noise level" if other else said

    def _isomorphic(self, size: int) -> list[list[_Candidate]]:
        """Cut the calls into maximal runs of isomorphic candidates, runs of one left out."""
        runs: list[list[_Candidate]] = []
        for offset in range(size):
            own: list[list[_Candidate]] = []
            for first in range(offset, len(self.calls) - size + 1, size):
                last = first + size - 1
                step = _Candidate(self._joined(first, last), first, last)
                if own and difference(own[-1][-1].region, step.region) is None:
                    own[-1].append(step)
                else:
                    own.append([step])
            runs += own
        return sorted((run for run in runs if len(run) > 1), key=len, reverse=True)

    def _joined(self, first: int, last: int) -> Region:
        """Return the region of some calls and of what one computes for a later one."""
        if first == last:
            return self.regions[first]
        nodes = {node for call in self.calls[first : last + 1] for node in call}
        for a, b in itertools.combinations(self.regions[first : last + 1], 2):
            nodes |= self._below(a.outputs) & self._above(b.inputs)
        return region_of(sorted(nodes, key=self.order.__getitem__))

    def _updated(self, a: Region, b: Region) -> list[Node]:
        """List inputs of `a` that `b` is given put together with an output."""
        if not self._is_another_level(a, b):
            return []
        changed = [(mine, theirs, self._origins(mine)) for mine, theirs in _changed(a, b)]
        return [x for x, y, own in changed if self._joins(y, a, own | self._below(own))]

    def _noised(self, a: Region, b: Region) -> list[Node]:
        """List inputs of `a` in whose place `b` is given an output and noise of its own."""
        if not self._is_another_level(a, b):
            return []
        # What a call has been given is no fresh noise: the slopes of one step start from one `x`.
        noise = set(self.around) - self.made - self._above(a.inputs)
        return [mine for mine, theirs in _changed(a, b) if self._joins(theirs, a, noise)]

    def _are_made_by_layers(self, nodes: list[Node]) -> bool:
        """Whether matrix products make what goes on, as in a refiner; a sampler starts anew."""
        return all(any(flops(above) for above in self._above([node])) for node in nodes)

    def _given_anew(self, a: Region, b: Region) -> list[tuple[Node, Node]]:
        """Pair the inputs in which two calls differ and which no call has made."""
        return [pair for pair in _changed(a, b) if pair[1] not in self.made]

    def _is_another_level(self, a: Region, b: Region) -> bool:
        """Whether two calls differ in noise levels, and else in what calls have made only."""
        given = self._given_anew(a, b)
        return bool(given) and all(self._are_levels(*pair) for pair in given)

    def _are_levels(self, x: Node, y: Node) -> bool:
        """Whether two nodes differ in one number a sample, frame or token, or computed from it."""
        if _equal(x, y) or (is_level(value(y), self.counts) and not self._is_weight(y)):
            return True
        if x.op == "placeholder" or (x.op, x.target) != (y.op, y.target) or is_lookup(x):
            return False
        if not x.all_input_nodes and not y.all_input_nodes:
            return not draws(y)  # filled with a number of the program
        first, second = (map_arg((node.args, node.kwargs), lambda _: None) for node in (x, y))
        inputs = zip(x.all_input_nodes, y.all_input_nodes, strict=False)
        return first == second and all(itertools.starmap(self._are_levels, inputs))

    def _is_weight(self, node: Node) -> bool:
        inputs = [above for above in self._above([node]) if above.op == "placeholder"]
        return bool(inputs) and all(isinstance(value(one), torch.nn.Parameter) for one in inputs)

    def _joins(self, node: Node, a: Region, others: set[Node]) -> bool:
        """Whether what `a` gives meets one of `others`, alike in size, on the way to `node`."""
        given = self._below(a.outputs) | set(a.outputs)
        for above in self._above([node]) - set(a.nodes):
            size = _elements(above)
            full = {x for x in self.around.predecessors(above) if _elements(x) == size}
            if size > 1 and len(full) > 1 and full & given and full & others:
                return True
        return False

    def _origins(self, node: Node) -> set[Node]:
        """Return a node and what it is a copy or a scaled form of."""
        found = {node}
        while above := list(self.around.predecessors(node)):
            size = max(map(_elements, above))
            full = [x for x in above if _elements(x) == size]
            if len(full) > 1 or not size:
                break
            (node,) = full
            found.add(node)
        return found

    def _above(self, nodes: Iterable[Node]) -> set[Node]:
        return {x for node in nodes for x in (node, *nx.ancestors(self.around, node))}

    def _below(self, nodes: Iterable[Node]) -> set[Node]:
        return {x for node in nodes for x in nx.descendants(self.around, node)}


def _broken(run: list[_Candidate], going_on: GoingOn) -> int | None:
    """Return the first call of a run that does not continue from the ones before."""
    pairs = itertools.pairwise(run)
    return next((b.first for a, b in pairs if not going_on(a.region, b.region)), None)


def _changed(a: Region, b: Region) -> list[tuple[Node, Node]]:
    """Pair the inputs in which two isomorphic regions differ."""
    pairs = zip(a.inputs, b.inputs, strict=True)
    return [(mine, theirs) for mine, theirs in pairs if not _equal(mine, theirs)]


def _equal(x: Node, y: Node) -> bool:
    """Whether two nodes compute the same of the same, such as one entry of a list of levels."""
    if x is y or x.op == "placeholder" or (x.op, x.target) != (y.op, y.target):
        return x is y
    first, second = (map_arg((node.args, node.kwargs), lambda _: None) for node in (x, y))
    inputs = zip(x.all_input_nodes, y.all_input_nodes, strict=False)
    return first == second and all(itertools.starmap(_equal, inputs))


def _elements(node: Node) -> int:
    """Count the elements of a tensor, or of all tensors in a tuple, as they are now."""
    tensors = [x for x in pytree.tree_leaves(value(node)) if isinstance(x, torch.Tensor)]
    return sum(hint(tensor.numel()) for tensor in tensors)


def _name(call: list[Node]) -> str:
    """Name a call by its repeat, such as `@1`."""
    _, at, repeat = next(iter(call[0].meta["nn_module_stack"])).partition("@")
    return f"@{repeat}" if at else "@0"
