"""Compare a rewrite with what it replaces, on small random inputs, while the graph is compiled.

Matching shapes alone is known to be silently wrong (pytorch#195320). So a rewrite is first applied
to a copy of the place it is for: in fp32, on the CPU, with sizes that are small and differ from
each other, so that an exchanged axis does not go unnoticed.

What it cannot see: rounding in narrower dtypes, and sizes that only matter at full length.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from lipass.passes.attention.products import ignored_input
from lipass.passes.core import PassContext
from lipass.passes.graph.compat import undisturbed, value

Shape = tuple[int, ...]
Rewrite = Callable[[Node, Mapping[Node, Node], PassContext], Any]

TOLERANCE = 1e-4
"""Of the largest output. Sums of tens of terms in fp32 differ by 1e-6 when they are reordered."""


class Incomparable(Exception):
    """Report that an original cannot be run on small inputs; the cause is chained."""


def difference(
    root: Node, inputs: Mapping[Node, Shape | torch.Tensor], rewrite: Rewrite
) -> str | None:
    """Say how a rewrite of `root` changes its value, or return None.

    Args:
        root: the output of what is rewritten.
        inputs: nodes that it is computed from, with small shapes to try, or tensors where not any
            numbers will do.
        rewrite: puts something in the place of a copy of `root`; it gets the copies of the inputs
            by the nodes they stand for.

    Raises:
        Incomparable: if the original does not run on the small inputs.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    with undisturbed(), torch.no_grad():
        values = [
            given if isinstance(given, torch.Tensor) else torch.randn(given, generator=generator)
            for given in inputs.values()
        ]
        try:
            gm, copies = _copy(root, dict(zip(inputs, values, strict=True)))
            expected = gm(*(x.clone() for x in values))
        except Exception as error:
            why = str(error).partition("\n")[0]
            raise Incomparable(f"it does not run on small inputs: {why}") from error
        rewrite(copies[root], copies, PassContext.of(gm.graph))
        gm.recompile()
        try:
            actual = gm(*values)
        except Exception as error:
            return f"its rewritten form does not run: {str(error).partition(chr(10))[0]}"
    if actual.shape != expected.shape:
        return f"its shape changes from {list(expected.shape)} to {list(actual.shape)}"
    off = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    return None if off <= TOLERANCE else f"its value changes by {off:.2g} of the largest"


def _copy(root: Node, inputs: Mapping[Node, torch.Tensor]) -> tuple[GraphModule, dict[Node, Node]]:
    """Copy what lies between inputs and root, in fp32, with fake values of the small shapes."""
    graph, copies, mode = Graph(), dict[Node, Node](), FakeTensorMode()
    for i, (node, given) in enumerate(inputs.items()):
        copies[node] = graph.placeholder(f"x{i}")
        with mode:
            copies[node].meta["example_value"] = torch.empty(given.shape, dtype=given.dtype)
    needed = between(root, inputs)
    for node in root.graph.nodes:
        if node in needed and node not in copies:
            with mode:
                copies[node] = _copy_call(node, graph, copies)
    graph.output(copies[root])
    return GraphModule(torch.nn.Module(), graph), copies


def between(root: Node, inputs: Container[Node]) -> set[Node]:
    """Return what `root` is computed from, down to `inputs`; both ends are part of it.

    Raises:
        ValueError: if it is computed from anything else.
    """
    needed, todo = {root}, [root]
    while todo:
        node = todo.pop()
        if node in inputs:
            continue
        if node.op not in ("call_function", "call_method"):
            raise ValueError(f"it also depends on %{node.name}")
        above = [x for x in node.all_input_nodes if x is not ignored_input(node)]
        todo += [x for x in above if x not in needed]
        needed.update(above)
    return needed


def _copy_call(node: Node, graph: Graph, copies: dict[Node, Node]) -> Node:
    unread = ignored_input(node)
    if unread is not None:
        copies[unread] = graph.call_function(torch.zeros, ((),))
        copies[unread].meta["example_value"] = torch.zeros(())
    copy = graph.node_copy(node, copies.__getitem__)
    copy.args, copy.kwargs = map_aggregate((copy.args, copy.kwargs), _in_fp32)
    # `x.half()` names its dtype
    if isinstance(copy.target, str) and _in_fp32(getattr(torch, copy.target, 0)) is torch.float32:
        copy.target = "float"
    args, kwargs = map_arg((copy.args, copy.kwargs), value)
    if copy.op == "call_method":
        copy.meta["example_value"] = getattr(args[0], str(copy.target))(*args[1:], **kwargs)
    else:
        copy.meta["example_value"] = copy.target(*args, **kwargs)  # type: ignore
    return copy


def _in_fp32(arg: Any) -> Any:
    return torch.float32 if isinstance(arg, torch.dtype) and arg.is_floating_point else arg
