"""Say what a repro script draws in place of the inputs of a graph, and how far it may be off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import Graph, Node

    from lipass.cli.tracing import TracedGraph


class NotWritable(ValueError):
    """Report something in a graph that code cannot spell; the form is rule, value, remedy."""


def drawn_input(node: Node, poses: set[str]) -> str:
    """Return the expression that makes an input of the graph."""
    import torch

    from lipass.passes.graph.compat import hint, value

    given = value(node)
    if isinstance(given, torch.Tensor):
        shape = tuple(map(hint, given.shape))
        stride = tuple(map(hint, given.stride()))
        maker = "cameras" if node.name in poses else "random"
        matrix = isinstance(given, torch.nn.Parameter) and len(shape) > 1
        scale = f", {shape[-1] ** -0.5:.4g}" if matrix else ""
        return f"{maker}({shape}, {stride}, {given.dtype}{scale})"
    if isinstance(given, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return repr(given.node.hint)
    if isinstance(given, (int, float, bool)) or given is None:
        return repr(given)
    raise NotWritable(
        f"inputs must be tensors and numbers, got {node.name} of kind {type(given).__name__}; "
        "make it in the model"
    )


def megabytes(inputs: list[Node]) -> str:
    """Say how much memory the inputs take."""
    import torch

    from lipass.passes.graph.compat import hint, value

    tensors = [value(node) for node in inputs if isinstance(value(node), torch.Tensor)]
    return f"{sum(hint(t.numel()) * t.itemsize for t in tensors) / 1e6:.1f} MB in all"


def tolerance_of(traced: TracedGraph) -> float:
    """Return how far the graphs may differ, by the passes that changed something and the dtypes.

    Where sums are reordered it is what `verify` takes in fp32, and a few roundings elsewhere.
    """
    import torch

    from lipass.passes.graph.compat import value
    from lipass.passes.graph.equivalence import TOLERANCE

    if all(record.numerics == "exact" for record in traced.records if record.changed):
        return 0.0
    values = [value(node) for node in traced.original.graph.nodes]
    dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return max([TOLERANCE, *(4 * torch.finfo(dtype).eps for dtype in dtypes)])


def poses_of(graph: Graph) -> list[tuple[Node, Any]]:
    """List the camera inputs of a graph."""
    from lipass.passes.attention.site import poses

    return poses(graph)
