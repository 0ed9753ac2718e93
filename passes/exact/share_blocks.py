"""Compile equal layers once: cut them out as one subgraph that every layer calls."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from lipass.passes.attention.site import rename_site, site_of
from lipass.passes.core import Numerics, Pass, PassContext
from lipass.passes.graph.body_sizes import give_sizes
from lipass.passes.graph.compat import guard, holds_now, invoke_subgraph, value, why_no_guard
from lipass.passes.graph.names import joint_name, module_path, module_paths
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
from lipass.passes.graph.settings import is_setting
from lipass.passes.printer import print_graph

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")
_ROOT = "layers"
"""What layers are called whose list is the root itself, and has no name."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class ShareBlocks(Pass):
    """Outline layers that compute the same on other parameters; the subgraph is compiled once.

    ::

        %linear: f32[1, n0, 32] = linear(%x, $blocks.0.qkv.weight, ..)  # blocks.0
        ..
        %linear_4: f32[1, n0, 32] = linear(%add, $blocks.1.qkv.weight, ..)  # blocks.1
        ..

        %blocks_call = blocks(%x, $text_0; 4 parameters)
        %blocks_call_1 = blocks(getitem(%blocks_call, 0), $text_1; 4 parameters)

    A layer is what one entry of a `ModuleList` computes; of nested lists the outermost whose
    entries are equal counts. The sites in the subgraph carry the names of all its layers, in the
    order of the calls.

    Keeps: layers that differ in anything but their inputs, are smaller than `nodes_min`, write to
    inputs, draw random numbers or set something (`sdpa_kernel`), share memory between inputs and
    outputs, read or give anything but tensors and sizes, or are used before they are complete;
    graphs whose gradient is recorded.
    """

    name: ClassVar[str] = "share-blocks"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    nodes_min: int = 8
    """Fewest nodes of a layer: smaller ones are not worth a boundary that ends fusion."""

    def run(self, graph: Graph, ctx: PassContext) -> bool:  # noqa: D102
        # What guard-steps has outlined is a graph of its own.
        inner = [m.graph for m in graph.owning_module.children() if isinstance(m, GraphModule)]
        return any([self._share(one, ctx) for one in (graph, *inner)])

    def _share(self, graph: Graph, ctx: PassContext) -> bool:
        changed, depth = False, 1
        while layers := _layers(graph, depth):
            for family, members in layers.items():
                alike = self._alike(graph, family, members, ctx)
                for regions in alike:
                    # Anew, because outlining the layers in between has changed their inputs.
                    now = [region_of(list(r.nodes), _anonymous) for r in regions]
                    _outline(graph, family, now, ctx)
                    ctx.note(family, "rewritten", f"{len(regions)} equal layers are compiled once")
                changed |= bool(alike)
            depth += 1
        return changed

    def _alike(
        self, graph: Graph, family: str, members: list[list[Node]], ctx: PassContext
    ) -> list[list[Region]]:
        """Group the layers of one list by what they compute; layers that stay get a note."""
        order = {node: i for i, node in enumerate(graph.nodes)}
        groups: list[list[Region]] = []
        for nodes in members:
            region = region_of(nodes, _anonymous)
            if len(region.nodes) < self.nodes_min:
                continue
            if why := _refusal(region, order):
                ctx.note(module_path(region.nodes[0]), "kept", why)
                continue
            home = next((g for g in groups if not difference(g[0], region, _may_guard)), None)
            # Caches have one length for all layers, but each layer's its own symbol.
            if home is None or difference(home[0], region, guard):
                groups.append([region])
            else:
                home.append(region)
        if len(groups) > 1 and all(len(group) == 1 for group in groups):
            why = difference(groups[0][0], groups[1][0], _may_guard)
            ctx.note(family, "kept", f"no two layers are equal; of the first two, {why}")
        return [group for group in groups if len(group) > 1]


def _layers(graph: Graph, depth: int) -> dict[str, list[list[Node]]]:
    """Collect the nodes of each entry of each module list, at the `depth`-th index of the path."""
    found: dict[str, dict[str, list[Node]]] = defaultdict(lambda: defaultdict(list))
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        for full in module_paths(node):
            path, _, repeat = f".{full}".partition("@")
            indices = list(_INDEX.finditer(path))
            if len(indices) >= depth:
                at = indices[depth - 1]
                family = _INDEX.sub(".*", path[: at.start()]).strip(".") or _ROOT
                found[family][f"{path[: at.end()]}@{repeat}"].append(node)
                break
    return {name: list(members.values()) for name, members in found.items()}


def _may_guard(condition: bool | torch.SymBool) -> bool:
    """Whether a condition holds now, and the user has not declared that it varies."""
    return holds_now(condition) and not why_no_guard(condition)


def _anonymous(text: str) -> str:
    """Take the numbers out of a module path."""
    return _INDEX.sub(".*", text.partition("@")[0].partition(":")[0])


def _refusal(region: Region, order: dict[Node, int]) -> str | None:
    if why := impurity(region):
        return f"not shared: {why}"
    # The body is traced where no setting of its own holds.
    if sets := next(filter(is_setting, region.nodes), None):
        return f"not shared: %{sets.name} sets something for its calls"
    if why := foreign(region) or alias(region) or alias_between(region):
        return f"not shared: {why}"
    tensors = [value(node) for node in region.outputs]
    if any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors):
        return "not shared: its gradient is recorded"
    if why := interruption(region, order):
        return f"not shared: {why}"
    return None


def _outline(graph: Graph, family: str, regions: list[Region], ctx: PassContext) -> None:
    """Put calls of one subgraph in place of equal regions."""
    body = body_of(regions, ctx)
    inner = body.module.graph
    _join_sites(inner, regions)
    give_sizes(body, regions[0], ctx)
    body.module.recompile()
    owner = graph.owning_module
    assert owner is not None
    name = _free_name(owner, family)
    owner.add_module(name, body.module)
    text = "\n".join([name, print_graph(inner), *map(str, regions[0].form)])
    # Addresses differ between processes, and torch's caches are keyed by what this names.
    text = _ADDRESS.sub("", text)
    identifier = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def call(index: int, args: list[Node]) -> Node:
        body_node = graph.get_attr(name)
        made = graph.create_node(
            "call_function", invoke_subgraph, (body_node, identifier, *args), name=f"{name}_call"
        )
        last = regions[index].nodes[-1]
        for key in {"nn_module_stack", "stack_trace"} & last.meta.keys():
            made.meta[key] = last.meta[key]
        return made

    put_calls(graph, regions, body, call)


def _join_sites(body: Graph, regions: list[Region]) -> None:
    """Give the sites of the body the names of all layers, in the order of the calls."""
    shared = [node for node in body.nodes if node.op not in ("placeholder", "output")]
    for node, *twins in zip(shared, *(region.nodes for region in regions), strict=True):
        if site := site_of(node):
            names = [other.name for twin in twins if (other := site_of(twin))]
            name = joint_name(names)
            rename_site(node, site, name)


def _free_name(module: torch.nn.Module, family: str) -> str:
    name = re.sub(r"\W+", "_", family).strip("_") or _ROOT
    taken = {taken for taken, _ in module.named_children()}
    while name in taken or hasattr(module, name):
        name += "_"
    return name
