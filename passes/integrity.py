"""Check after every pass what it must keep true: metadata, aliasing, mutation, known ops."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg

from lipass.passes.core import PassContext, PassError
from lipass.passes.graph.compat import known_true, unguarded, value
from lipass.passes.graph.modes import follow, inside
from lipass.passes.graph.primitives import frozen
from lipass.passes.graph.writes import mutates, storage


@dataclass(frozen=True)
class Snapshot:
    """Hold what verification compares with: the calls, the aliases and the writes of a graph."""

    calls: dict[Node, tuple[object, object, object]]
    aliases: set[tuple[int, str]]
    """Pairs (position in the outputs, name of an input with the same memory)."""
    writes: set[str]


def snapshot(graph: Graph) -> Snapshot:
    """Record a graph in front of a pass."""
    calls = {node: (node.target, node.args, node.kwargs) for node in graph.nodes}
    writes = {node.name for node in graph.nodes if mutates(node)}
    return Snapshot(calls, _aliases(graph), writes)


def check_integrity(graph: Graph, before: Snapshot, ctx: PassContext) -> None:
    """Compare a graph with its snapshot.

    Fake values of new and changed nodes and of all that is computed from them are propagated
    again; shapes, dtypes and devices must be what the metadata says. Strides may change, and the
    metadata then follows.

    Raises:
        PassError: naming the node and the invariant.
    """
    _lint(graph)
    _check_ops(graph)
    _check_values(graph, before, ctx)
    if new := {n.name for n in graph.nodes if mutates(n)} - before.writes:
        raise PassError(f"a pass adds no mutation, got {', '.join(sorted(new))}")
    if extra := _aliases(graph) - before.aliases:
        output, name = min(extra)
        raise PassError(f"a pass adds no aliasing, got output {output} in the memory of {name}")


def _lint(graph: Graph) -> None:
    try:
        graph.lint()
    except RuntimeError as error:
        # the rest of the message is the whole graph
        raise PassError(str(error).partition("!")[0]) from error


def _check_ops(graph: Graph) -> None:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "lipass":
            name = node.target._opname
            if not hasattr(torch.ops.lipass, name):
                raise PassError(f"{node.name} calls lipass::{name}, which is not registered")


def _check_values(graph: Graph, before: Snapshot, ctx: PassContext) -> None:
    dirty: set[Node] = set()
    bodies: set[object] = set()
    """Modules that ran already; the calls of one have equal inputs."""
    settled: set[object] = set()
    """Calls that gave what their metadata says; other layers make the same ones."""
    autocasts: list[Node] = []
    with ctx.fake_mode, unguarded(ctx.fake_mode), torch.no_grad():
        for node in graph.nodes:
            follow(autocasts, node)
            if node.op in ("placeholder", "output", "get_attr"):
                continue
            same = before.calls.get(node)
            if same is None and "example_value" not in node.meta:
                raise PassError(f"{node.name} has no example_value; insert it with an Emitter")
            unchanged = same is not None and all(
                a is b for a, b in zip(same, (node.target, node.args, node.kwargs), strict=True)
            )
            if unchanged and not any(above in dirty for above in node.all_input_nodes):
                continue
            if _is_region(node) or mutates(node) or node.target in bodies:
                continue
            if node.op == "call_module":
                bodies.add(node.target)
            call = frozen((node.op, node.target, node.args, node.kwargs, value(node)))
            call = (call, *autocasts)
            if call in settled:
                continue
            with inside(autocasts):
                fresh = _run(graph, node)
            if _settle(node, fresh):
                dirty.add(node)
            else:
                settled.add(call)


def _is_region(node: Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _run(graph: Graph, node: Node) -> Any:
    args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
    try:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return graph.owning_module.get_submodule(str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
    except Exception as error:
        raise PassError(f"{node.name} does not run on its inputs: {error}") from error


def _settle(node: Node, fresh: Any) -> bool:
    """Compare a propagated value with the metadata; return whether its strides differ."""
    old, new = pytree.tree_leaves(value(node)), pytree.tree_leaves(fresh)
    if len(old) != len(new) or not all(map(_same_kind, old, new)):
        raise PassError(
            f"{node.name} is {_brief(fresh)}, but its metadata says {_brief(value(node))}"
        )
    if all(map(_same_strides, old, new)):
        return False
    for before, after in zip(old, new, strict=True):
        if isinstance(before, torch.Tensor) and before.requires_grad:
            after.requires_grad_()  # it was made without
    node.meta["example_value"] = fresh
    return True


def _same_kind(old: Any, new: Any) -> bool:
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return not isinstance(old, torch.Tensor) and known_true(old == new)
    if free_unbacked_symbols(old) or free_unbacked_symbols(new):
        return True  # sizes that depend on data have new names each time
    same_type = old.dtype == new.dtype and old.device == new.device and old.dim() == new.dim()
    return same_type and all(map(known_true, map(operator.eq, old.shape, new.shape)))


def _same_strides(old: Any, new: Any) -> bool:
    if not isinstance(old, torch.Tensor) or free_unbacked_symbols(old):
        return True
    return all(map(known_true, map(operator.eq, old.stride(), new.stride())))


def _brief(tensor: Any) -> str:
    if not isinstance(tensor, torch.Tensor):
        return repr(tensor)
    return f"{tensor.dtype}{list(tensor.shape)} on {tensor.device}"


def _aliases(graph: Graph) -> set[tuple[int, str]]:
    memory: dict[int, str] = {}
    for node in graph.find_nodes(op="placeholder"):
        if (at := storage(value(node))) is not None:
            memory[at] = node.name
    outputs: list[Node] = []
    map_arg(graph.output_node().args, outputs.append)
    places = enumerate(storage(value(node)) for node in outputs)
    return {(i, memory[at]) for i, at in places if at is not None and at in memory}
