"""Count the work of a graph and predict what is left of it at rewritten attention sites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.fx

    from lipass.passes.attention.sparse_call import SparseCall

# Calls whose work grows with a product of sizes; what is left out is linear in its inputs.
_ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class SitePrediction:
    """Say what one call of a rewritten site would do on the device of its tensors.

    Attributes:
        provider: implementation that would run; `sdpa` where the cost gate keeps it dense.
        density: share of the key blocks that each query block would visit.
        kept_dense: why the gate keeps it dense, or nothing.
    """

    provider: str
    density: float
    kept_dense: str


def flops(node: torch.fx.Node) -> int:
    """Count the FLOPs of the matrix products of one call; 0 for what is linear in its inputs."""
    from lipass.passes.graph import ops

    return _attention_flops(node) if ops.name_of(node) == _ATTENTION else ops.flops(node)


def predictions(gm: torch.fx.GraphModule) -> Iterator[tuple[str, SitePrediction]]:
    """Predict every `lipass::sparse_attention` call of a rewritten graph, by site name."""
    import torch.fx

    from lipass.passes.attention.sparse_call import SparseCall
    from lipass.passes.graph.names import names_of

    for module in gm.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in SparseCall.nodes(module.graph):
                call = SparseCall.of(node)
                prediction = _predict(call)
                yield from ((name, prediction) for name in names_of(call.site))


def _attention_flops(node: torch.fx.Node) -> int:
    from lipass.passes.graph.compat import hint, value

    given = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
    q, k, v = (value(given[name]).shape for name in ("query", "key", "value"))
    heads = 1
    for size in q[:-2]:
        heads *= hint(size)
    return 2 * heads * hint(q[-2]) * hint(k[-2]) * (hint(q[-1]) + hint(v[-1]))


def _predict(call: SparseCall) -> SitePrediction:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from lipass.kernels import cost, registry
    from lipass.kernels.block_sparse.kind import Kind, measured
    from lipass.kernels.select.api import selected_blocks
    from lipass.passes.graph.compat import hint, value

    query = value(call.q)
    layout, grid = call.layout(hint)
    width = selected_blocks(layout, grid, call.budget, call.role, call.sink(hint))
    dense = ""
    masked = call.latent_mask is not None  # of blocks that it hides no prediction is made
    if call.budget >= 1.0 and not masked:
        dense = "budget 1.0 visits every block"
    elif width == layout.blocks and call.keep_frames is None and not masked:
        dense = "protected blocks and budget together visit every block"
    else:
        shape = tuple(map(hint, query.shape))
        with unset_fake_temporarily():  # the gate measures this machine
            sorts = call.planner == "buckets"
            found = cost.predict(
                shape, query.dtype, query.device, layout, grid, width, sorts=sorts
            )
        dense = found.why_dense
    volumes = grid.block_tokens, layout.block_tokens
    kind = Kind(query.device, query.dtype, hint(query.shape[3]), *volumes, False)
    # On a CPU the best is built when the model is compiled.
    built_later = query.device.type == "cpu"
    chosen = registry.find(
        "block_sparse", kind.device, lambda module: None if built_later else module.why_not(kind),
        measured(kind, layout),
    )  # fmt: skip
    if not dense and isinstance(chosen, registry.Refused):
        dense = chosen.reason
    if dense or isinstance(chosen, registry.Refused):
        return SitePrediction("sdpa", 1.0, dense)
    return SitePrediction(chosen.name, width / layout.blocks, "")
