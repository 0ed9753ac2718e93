"""Describe and compare regions of a graph, such as the repeats of one module call."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from lipass.passes.graph.arguments import overload_of
from lipass.passes.graph.collectives import is_collective
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.frame import source_name
from lipass.passes.graph.modes import half_inside
from lipass.passes.graph.names import without_repeat
from lipass.passes.graph.ops import draws
from lipass.passes.graph.writes import memory_written, storage, writes_between


@dataclass(frozen=True)
class Region:
    """Hold the nodes of a region in order, with what goes in and out."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    """Nodes outside that the region reads, in the order of first use."""
    outputs: tuple[Node, ...]
    """Nodes of the region that are used outside."""
    form: tuple[object, ...]
    """What the nodes compute, without their names: equal for isomorphic regions."""


def region_of(nodes: list[Node], anonymous: Callable[[str], str] = without_repeat) -> Region:
    """Describe a region; arithmetic on sizes from outside stays there, as repeats share it.

    Args:
        nodes: the nodes in order.
        anonymous: takes out of the name of a site what may differ between isomorphic regions;
            what a call tells operators of others by a text is theirs.
    """
    inside: dict[Node, int] = {}
    for node in nodes:
        if not _is_size_arithmetic(node) or any(above in inside for above in node.all_input_nodes):
            inside[node] = len(inside)
    inputs: dict[Node, int] = {}

    def form(arg: Any) -> object:
        if isinstance(arg, Node):
            if arg in inside:
                return ("node", inside[arg])
            return ("input", inputs.setdefault(arg, len(inputs)))
        if isinstance(arg, (list, tuple)):
            return (type(arg).__name__, *(form(item) for item in arg))
        if isinstance(arg, dict):
            return tuple((key, form(item)) for key, item in arg.items())
        if isinstance(arg, slice):
            return ("slice", form(arg.start), form(arg.stop), form(arg.step))
        # 1 == 1.0 == True, but they are not the same argument
        return (type(arg).__name__, arg)

    forms = tuple((n.op, n.target, *map(form, _nameless(n, anonymous))) for n in inside)
    outputs = tuple(n for n in inside if any(user not in inside for user in n.users))
    return Region(tuple(inside), tuple(inputs), outputs, forms)


def _nameless(node: Node, anonymous: Callable[[str], str]) -> tuple[tuple[Any, ...], Any]:
    """Return the arguments of a call, with the name of its site made anonymous if it is ours."""
    overload = overload_of(node.target)
    if overload is None or overload.namespace != "lipass":
        return node.args, node.kwargs
    names = [one.name for one in overload._schema.arguments]

    def nameless(key: str, given: Any) -> Any:
        return anonymous(given) if key == "site" else given

    args = map(nameless, names, node.args)
    kwargs = {key: nameless(key, given) for key, given in node.kwargs.items()}
    return tuple(args), kwargs


def _is_size_arithmetic(node: Node) -> bool:
    """Whether a node computes a size from sizes alone."""
    if node.op != "call_function" or not isinstance(value(node), (torch.SymInt, int)):
        return False
    return all(isinstance(value(above), (torch.SymInt, int)) for above in node.all_input_nodes)


def difference(
    a: Region, b: Region, equal: Callable[[bool | torch.SymBool], bool] = known_true
) -> str | None:
    """Say where two regions differ, or return None if one can stand for the other.

    Args:
        a: the region that would be compiled.
        b: the region that it would stand for.
        equal: whether sizes count as equal; `holds_now` for sizes that need a guard.
    """
    if len(a.nodes) != len(b.nodes):
        return f"they have {len(a.nodes)} and {len(b.nodes)} nodes"
    for first, second, mine, other in zip(a.form, b.form, a.nodes, b.nodes, strict=True):
        if first != second:
            return f"%{mine.name} and %{other.name} differ"
    for mine, other in zip(a.inputs, b.inputs, strict=True):
        if mine is not other and not _same_kind(value(mine), value(other), equal):
            return f"inputs %{mine.name} and %{other.name} differ in shape or dtype"
    return None


def _same_kind(a: Any, b: Any, equal: Callable[[bool | torch.SymBool], bool]) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and equal(a == b)
    if a.dtype != b.dtype or a.device != b.device or a.dim() != b.dim():
        return False
    return all(equal(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def impurity(region: Region, harmless: Container[Node] = ()) -> str | None:
    """Say what keeps a region from being skipped or repeated at will, or return None.

    Writing to memory that the region itself made is harmless.

    Args:
        region: the nodes.
        harmless: writes to its inputs that may be left out.
    """
    if region.nodes and (why := half_inside(region.nodes)):
        return why
    given = {storage(value(node)): node for node in region.inputs}
    given.pop(None, None)
    for node in region.nodes:
        written = set() if node in harmless else memory_written(node)
        for at in written & set(given):
            return f"%{node.name} writes to the input {source_name(given[at])}"
        if draws(node):
            return f"%{node.name} draws random numbers"
        if is_collective(node):
            return f"%{node.name} exchanges tensors with other processes"
    return None


def alias(region: Region) -> str | None:
    """Say which output shares memory with an input, or return None."""
    memory = {storage(value(node)): node.name for node in region.inputs}
    for node in region.outputs:
        at = storage(value(node))
        if at is not None and at in memory:
            return f"%{node.name} shares memory with %{memory[at]}"
    return None


def alias_between(region: Region) -> str | None:
    """Say which two outputs share memory, or return None."""
    memory: dict[int, str] = {}
    for node in region.outputs:
        at = storage(value(node))
        if at is not None and memory.setdefault(at, node.name) != node.name:
            return f"%{node.name} shares memory with %{memory[at]}"
    return None


def interruption(region: Region, order: dict[Node, int]) -> str | None:
    """Say why a region cannot run where its last node stands, or return None."""
    last, inside = order[region.nodes[-1]], set(region.nodes)
    for node in writes_between(region.nodes[0], region.nodes[-1]):
        if node not in inside:
            return f"it is interrupted by %{node.name}, which writes to its input"
    for node in region.outputs:
        for user in node.users:
            if user not in inside and order[user] < last:
                return f"it is used by %{user.name} before it is complete"
    return None
