"""Compute once what call after call of a loop computes alike: cameras, projected text, tables."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, Node
from torch.fx.node import map_arg

# The imports register operators that the pass has to know.
import lipass.kernels.chosen_latents
import lipass.kernels.nearest.order
import lipass.kernels.ops
import lipass.kernels.view_overlap.api  # noqa: F401
from lipass.passes.attention import match
from lipass.passes.attention.operators import is_attention
from lipass.passes.attention.site import poses, site_of, sites
from lipass.passes.attention.step_inputs import step_inputs
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.arguments import overload_of
from lipass.passes.graph.compat import hint, is_parameter, value
from lipass.passes.graph.marks import invariants, set_invariant, step_of
from lipass.passes.graph.ops import flops, reads
from lipass.passes.graph.outline import hidden_sizes, to_module
from lipass.passes.graph.region import impurity, region_of
from lipass.passes.graph.worth import worth_once
from lipass.passes.graph.writes import memory_written, storage

Roots = frozenset[Node]

# What blocks of a history are chosen by; at least one addition for each number of its keys.
_OF_A_HISTORY = (
    torch.ops.lipass.pool_blocks.default,
    torch.ops.lipass.key_basis.default,
    torch.ops.lipass.key_order.default,
    torch.ops.lipass.pool_in_order.default,
)
# What an open session answers may change from chunk to chunk on the same inputs.
_ANSWERED = (
    torch.ops.lipass.chosen_latents.default,
    torch.ops.lipass.view_overlap.default,
)


@dataclass(frozen=True)
class HoistCalls(Pass):
    """Outline what only the inputs determine that a loop around the model does not change.

    ::

        %k = linear($text, $w);  %o = scaled_dot_product_attention(%q, %k, ..)

        %invariant_0 = invariant_0($text; 1 parameters);  %k = getitem(%invariant_0, 0)
        %o = scaled_dot_product_attention(%q, %k, ..)

    While a session is open, an outlined body runs again only where one of its inputs is another
    object or was written to (`lipass.runtime.results`); otherwise it runs in every call.

    torch counts writes, but not those through `Tensor.data` and numpy, by which adapters are often
    merged. So products are kept only where `counted_writes` promises that there are none; without
    it only means of a history are, which choose blocks and are no part of the result.

    Inputs that stay, by what the graph shows: parameters; the cameras; what keys are computed from
    that no query is computed from, such as an encoded prompt; and where the graph is one denoising
    step, all that is neither denoised nor a noise level, such as rays or actions. An input that
    changes all the same costs a comparison. There is one body for each set of inputs, so that a
    new camera path does not project the prompt anew.

    Keeps: what holds no large matrix product and no means of a large history; views, which cost
    nothing; what is written to, drawn at random, returned or differentiated; what runs in an
    autocast; attention; what an open session may answer; graphs that hold the loop, for which
    `hoist-steps` does this.
    """

    name: ClassVar[str] = "hoist-calls"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    requires: ClassVar[tuple[str, ...]] = ("find-attention", "find-poses", "find-steps")
    precedes: ClassVar[tuple[str, ...]] = ("share-blocks",)

    counted_writes: bool = False
    """Weights and inputs are only written to in ways that torch counts."""
    work_min: int = 1 << 20
    """Multiply-adds that a body has to save; less is not worth a boundary that nothing is fused
    across."""

    @classmethod
    def options_from(cls, options: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102
        return {"counted_writes": options.get("counted_writes", False)}

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        if any(step_of(node) for node in graph.nodes):
            ctx.note("invariants", "kept", "the loop is in the graph, where hoist-steps sees it")
            return False
        roots = _invariant(graph, self.counted_writes)
        outlined: set[Node] = set()
        for group in sorted(set(roots.values()), key=lambda one: (len(one), _names(one))):
            own = [node for node, above in roots.items() if above <= group]
            nodes = worth_once([node for node in own if node not in outlined])
            if nodes and sum(map(_work, nodes)) >= self.work_min:
                name = f"invariant_{len(invariants(graph))}"
                _outline(graph, nodes, name, ctx)
                outlined.update(nodes)
                said = f"for the same {_names(group)}" if group else "for the same parameters"
                ctx.note("invariants", "rewritten", f"{_count(nodes)} run once {said}")
        if not outlined:
            ctx.note("invariants", "kept", "no large product depends on what calls leave alone")
        return bool(outlined)


def _invariant(graph: Graph, counted_writes: bool) -> dict[Node, Roots]:
    """Map calls, in order, to the inputs beside parameters that alone determine them."""
    roots: dict[Node, Roots] = {}
    for node in graph.find_nodes(op="placeholder"):
        if (is_parameter(node) and counted_writes) or not isinstance(value(node), torch.Tensor):
            roots[node] = frozenset()
    roots |= {node: frozenset([node]) for node in _fixed_inputs(graph)}
    written = {at for node in graph.nodes for at in memory_written(node)}
    returned = {at for node in graph.output_node().all_input_nodes if (at := storage(value(node)))}
    roots = {node: above for node, above in roots.items() if storage(value(node)) not in written}
    inputs = set(roots)
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or site_of(node) is not None:
            continue
        if overload_of(node.target) in _ANSWERED:
            continue
        above = node.all_input_nodes
        if _is_product(node) and not counted_writes:
            continue
        if not above or not all(one in roots for one in above):
            continue
        if _memory(node) & (written | returned) or impurity(region_of([node])):
            continue
        if value(node) is None or _is_recorded(value(node)) or _is_lazy(value(node)):
            continue
        roots[node] = frozenset().union(*(roots[one] for one in above))
    return {node: above for node, above in roots.items() if node not in inputs}


def _work(node: Node) -> int:
    """Return the multiply-adds of a matrix product, or what choosing blocks adds; 0 for others."""
    if node.target in _OF_A_HISTORY:
        return hint(value(node.args[0]).numel())
    return flops(node) // 2


def _is_product(node: Node) -> bool:
    return flops(node) > 0


def _is_recorded(result: object) -> bool:
    return isinstance(result, torch.Tensor) and result.requires_grad


def _is_lazy(result: object) -> bool:
    """Whether a tensor is a conjugate or a negative that nobody has computed, only marked."""
    return isinstance(result, torch.Tensor) and (result.is_conj() or result.is_neg())


def _memory(node: Node) -> set[int]:
    leaves = pytree.tree_leaves(value(node))
    return {at for leaf in leaves if (at := storage(leaf)) is not None}


def _fixed_inputs(graph: Graph) -> list[Node]:
    """List the cameras, and the inputs that keys and no queries are computed from."""
    cameras = {node for node, _ in poses(graph)}
    of_keys: set[Node] = set()
    of_queries: set[Node] = set()
    for node, _ in sites(graph):
        queries, keys = _operands(node)
        for q in queries:
            of_queries |= _inputs_above(q)
        for key in keys:
            own = _inputs_above(key) - cameras
            of_keys |= own if len(own) == 1 else set()
    of_step = _conditions(graph) - cameras
    return [*cameras, *sorted((of_keys - of_queries - cameras) | of_step, key=_name)]


def _conditions(graph: Graph) -> set[Node]:
    """List the tensors that every denoising step of a chunk is given, if the graph is one step."""
    given = step_inputs(graph)
    if isinstance(given, match.Refusal):
        return set()
    inputs = graph.find_nodes(op="placeholder")
    found = {inputs[i] for i in given.conditions}
    return {node for node in found if isinstance(value(node), torch.Tensor)}


def _operands(call: Node) -> tuple[list[Node], list[Node]]:
    """Return what the queries and what the pieces of the keys and values of a call are."""
    found = match.attention(call) if is_attention(call) else None
    if isinstance(found, match.Operands):
        return [found.q], [*found.keys, *found.values]
    queries: list[Node] = []
    keys: list[Node] = []
    map_arg(call.args[:1], queries.append)
    map_arg(call.args[1:3], keys.append)
    return queries, keys


def _inputs_above(node: Node) -> set[Node]:
    """List the inputs, beside parameters, above a node; those behind attention are hidden."""
    stack, seen = [node], {node}
    while stack:
        above = stack.pop()
        if site_of(above) is None:
            fresh = [one for one in reads(above) if one not in seen]
            seen.update(fresh)
            stack += fresh
    return {
        one
        for one in seen
        if one.op == "placeholder"
        and isinstance(value(one), torch.Tensor)
        and not is_parameter(one)
    }


def _outline(graph: Graph, nodes: list[Node], name: str, ctx: PassContext) -> None:
    """Put a call of a new body in front of everything; its results replace those of `nodes`."""
    front = [*graph.find_nodes(op="placeholder"), *_results(graph)][-1]
    for node in nodes:
        front.append(node)
        front = node
    region = region_of(nodes)
    sizes = hidden_sizes(region, ctx)
    # A view of an input stays where others read it: no result lies in the memory of an input.
    given = {storage(value(node)) for node in region.inputs} - {None}
    positions = [region.nodes.index(node) for node in region.outputs if not _memory(node) & given]
    body = to_module(region, positions)
    with body.graph.inserting_before(next(iter(body.graph.nodes))):
        for size in sizes:
            body.graph.placeholder(size.name).meta["example_value"] = value(size)
    body.recompile()
    assert graph.owning_module is not None
    graph.owning_module.add_module(name, body)
    with graph.inserting_after(front):
        call = graph.call_module(name, (*sizes, *region.inputs))
    call.meta["example_value"] = tuple(value(region.nodes[i]) for i in positions)
    set_invariant(call)
    for n, position in reversed(list(enumerate(positions))):
        node = region.nodes[position]
        with graph.inserting_after(call):
            result = graph.call_function(operator.getitem, (call, n))
        result.meta["example_value"] = value(node)
        node.replace_all_uses_with(result, lambda user: user not in region.nodes)


def _results(graph: Graph) -> list[Node]:
    """List the calls of bodies that were outlined before, and what is taken from them."""
    calls = set(invariants(graph))
    return [node for node in graph.nodes if calls & {node, *node.all_input_nodes}]


def _count(nodes: list[Node]) -> str:
    return f"{len(nodes)} calls" if len(nodes) > 1 else "1 call"


def _names(group: Roots) -> str:
    return ", ".join(sorted(map(_name, group)))


def _name(node: Node) -> str:
    return node.name.removeprefix("l_").strip("_")
