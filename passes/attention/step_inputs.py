"""Tell apart what a denoising step is given: latents, noise level, and what conditions it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import functional as F

from lipass.passes.attention.match import Refusal
from lipass.passes.attention.site import sites
from lipass.passes.graph.compat import hint, is_parameter, value
from lipass.passes.graph.frame import source_name
from lipass.passes.graph.marks import StepInputs

_EMBEDDINGS = {F.embedding, torch.embedding}


def step_inputs(graph: Graph) -> StepInputs | Refusal:
    """Say what each input of a graph is, if the graph is one denoising step.

    * latents: tensors of the shape of an output, or of all of it but one axis (models that join
      channels take more than they return); else the largest that queries are computed from.
    * levels: floats, and tensors with one number a sample, latent frame or token of the queries,
      or of those queries that are made from the latents. Where several qualify, those that are
      looked up in an embedding or a table are conditions, such as an action or a position.
    * parameters; and all else are conditions.
    """
    inputs = graph.find_nodes(op="placeholder")
    parameters = [is_parameter(node) for node in inputs]
    free = [node for node, own in zip(inputs, parameters, strict=True) if not own]
    latents = _latents(graph, free)
    if not latents:
        return Refusal("none of its inputs has the shape of latents")
    counts = level_counts(graph, latents[0])
    levels = [node for node in free if node not in latents and is_level(value(node), counts)]
    if len(levels) > 1:
        levels = [node for node in levels if not _is_looked_up(node)] or levels
    if not levels:
        return Refusal("none of its inputs is a noise level or timestep, so it is no step")

    def places(nodes: list[Node]) -> tuple[int, ...]:
        return tuple(i for i, node in enumerate(inputs) if node in nodes)

    known = [*latents, *levels]
    return StepInputs(
        names=tuple(source_name(node) for node in inputs),
        parameters=tuple(i for i, own in enumerate(parameters) if own),
        conditions=places([node for node in free if node not in known]),
        levels=places(levels),
        latents=places(latents),
        denoised=_denoised(graph, latents),
    )


def returns_latents(graph: Graph) -> bool:
    """Whether an output has the shape of an input, or all of it but one axis."""
    inputs = graph.find_nodes(op="placeholder")
    free = [_sizes(node) for node in inputs if not is_parameter(node)]
    given = [own for own in free if own and len(own) > 2]
    made = [own for node in graph.output_node().all_input_nodes if (own := _sizes(node))]
    return any(_axes_that_differ(a, b) in (0, 1) for a in made for b in given)


def _denoised(graph: Graph, latents: list[Node]) -> int:
    """Count the outputs that have the shape of latents, or of all but one axis; at least one."""
    made = [own for node in graph.output_node().all_input_nodes if (own := _sizes(node))]
    given = [own for node in latents if (own := _sizes(node))]
    like = [own for own in made if any(_axes_that_differ(own, one) in (0, 1) for one in given)]
    return max(1, len(like))


def _latents(graph: Graph, free: list[Node]) -> list[Node]:
    outputs = [s for x in graph.output_node().all_input_nodes if (s := _sizes(x)) is not None]
    sizes = {node: _sizes(node) for node in free}
    noisy = {node: own for node, own in sizes.items() if own is not None and len(own) > 2}
    for differing in (0, 1):
        found = [
            node
            for node, own in noisy.items()
            if any(_axes_that_differ(own, out) == differing for out in outputs)
        ]
        if found:
            return found
    queries = _inputs_of_queries(graph)
    above = [node for node in noisy if node in queries]
    return sorted(above, key=lambda node: hint(value(node).numel()))[-1:]


def _sizes(node: Node) -> tuple[int, ...] | None:
    """Return the sizes that a tensor of floats has in the call that is compiled."""
    tensor = value(node)
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return None
    return tuple(hint(size) for size in tensor.shape)


def _axes_that_differ(a: tuple[int, ...], b: tuple[int, ...]) -> int | None:
    return sum(x != y for x, y in zip(a, b, strict=True)) if len(a) == len(b) else None


def _inputs_of_queries(graph: Graph) -> set[Node]:
    todo = [node.args[0] for node, _ in sites(graph) if isinstance(node.args[0], Node)]
    seen: set[Node] = set(todo)
    while todo:
        fresh = [one for one in todo.pop().all_input_nodes if one not in seen]
        seen.update(fresh)
        todo += fresh
    return {node for node in seen if node.op == "placeholder"}


def level_counts(graph: Graph, latents: Node) -> set[int]:
    """Return how many numbers a level may have along an axis: samples, frames, tokens.

    Latents may be part of what attends, as where clean frames of a memory are put in front.
    """
    tensor = value(latents)
    batched = isinstance(tensor, torch.Tensor) and tensor.dim() > 1
    batch = hint(tensor.shape[0]) if batched else 1
    grids = [site.q_grid for _, site in sites(graph) if site.q_grid]
    frames = {hint(grid[0]) for grid in grids}
    places = {hint(grid[1]) * hint(grid[2]) for grid in grids}
    own = {hint(n) for n in tensor.shape[1:-2]} if batched and tensor.dim() == 5 else set()
    own = {n for n in own if n < max(frames, default=0)}
    tokens = {n * each for n in frames | own for each in places}
    return {1, batch, *frames, *tokens, *(batch * n for n in frames)}


def is_level(given: Any, counts: set[int]) -> bool:
    """Whether a value has as many numbers as a noise level or timestep may have."""
    if isinstance(given, float | torch.SymFloat):
        return True
    if not isinstance(given, torch.Tensor) or given.dtype is torch.bool or given.dim() > 5:
        return False
    return all(hint(size) in counts for size in given.shape)


def is_lookup(node: Node) -> bool:
    """Whether a call takes rows of an embedding."""
    return node.target in _EMBEDDINGS


def _is_looked_up(node: Node) -> bool:
    """Whether an input is an index into an embedding or a table, as it is or cast."""
    todo = [(node, 0)]
    while todo:
        above, steps = todo.pop()
        for user in above.users:
            if (is_lookup(user) and user.args[0] is above) or _is_index(above, user):
                return True
            if user.op == "call_method" and steps < 3:
                todo.append((user, steps + 1))
    return False


def _is_index(node: Node, user: Node) -> bool:
    """Whether a call takes those rows of a tensor that a node names."""
    tensor = value(node)
    if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point():
        return False
    if user.target not in (operator.getitem, torch.index_select, "index_select"):
        return False
    return node in user.all_input_nodes and user.args[0] is not node
