"""Turn a traced target into the document of `lipass inspect`: plain data, one fact a field.

Every list entry names its graph, so that a consumer can read the lists without walking a tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lipass.cli import cost

if TYPE_CHECKING:
    import torch.fx

    from lipass.cli.tracing import Trace, TracedGraph
    from lipass.passes.attention.site import AttentionSite
    from lipass.passes.core import PassPipeline

SCHEMA_VERSION = 2


class Findings:
    """Collect what is known of each graph while Dynamo still has its symbols."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all graphs."""
        self.graphs: list[dict[str, Any]] = []
        self.sites: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.poses: list[dict[str, Any]] = []
        self.passes: list[dict[str, Any]] = []
        self.texts: list[list[tuple[str, str]]] = []
        """Printed graph in front of and behind each pass, one list per graph."""

    def add(self, traced: TracedGraph) -> None:
        """Add one graph."""
        import torch

        index = len(self.graphs)
        sites = _sites(traced, index)
        layers = _layers(traced.facts.graph)
        before = sum(layer["flops"] for layer in layers)
        saved = sum(round(s["flops"] * (1 - s["density"])) for s in sites if s["density"])
        nodes = sum(
            len(module.graph.nodes)
            for module in traced.rewritten.modules()
            if isinstance(module, torch.fx.GraphModule)
        )
        self.graphs.append(
            {
                "graph": index,
                "nodes": len(traced.original.graph.nodes),
                "nodes_after": nodes,
                "flops": before,
                "flops_after": before - saved,
                "inputs": _inputs(traced.facts.graph),
                "layers": layers,
            }
        )
        self.sites += sites
        self.steps += _steps(traced, index)
        self.poses += _poses(traced.facts.graph, index)
        self.passes += [
            {
                "graph": index,
                "name": record.name,
                "numerics": record.numerics,
                "changed": record.changed,
                "seconds": record.seconds,
                "notes": [
                    {"site": note.site, "action": note.action, "reason": note.reason}
                    for note in record.notes
                ],
                "diff": record.diff,
            }
            for record in traced.records
        ]
        self.texts.append([(record.before, record.after) for record in traced.records])

    def document(self, target: str, preset: str, pipeline: PassPipeline, trace: Trace) -> dict:
        """Return the document of `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "target": target,
            "preset": preset,
            "pipeline": str(pipeline),
            "pipeline_uuid": pipeline.uuid(),
            "fake": trace.fake,
            "why_real": trace.why_real,
            "seconds": trace.seconds,
            "graphs": self.graphs,
            "sites": self.sites,
            "steps": self.steps,
            "poses": self.poses,
            "passes": self.passes,
            "graph_breaks": [asdict(found) for found in trace.breaks],
        }


def sizes(grid: Iterable[Any] | None) -> list[int | str] | None:
    """Return a grid as JSON: numbers, and symbols as text."""
    from lipass.passes.graph.compat import is_symbolic

    if grid is None:
        return None
    return [str(size) if is_symbolic(size) else int(size) for size in grid]


def _sites(traced: TracedGraph, index: int) -> list[dict[str, Any]]:
    from lipass.compile.sites import site_records
    from lipass.passes.attention.site import sites
    from lipass.passes.core import PassPipeline, pass_class
    from lipass.passes.graph.names import without_repeat

    predicted = {without_repeat(name): one for name, one in cost.predictions(traced.rewritten)}
    there = list(sites(traced.facts.graph))
    # Passes that do not rewrite attention have notes of the same layers, which decide nothing.
    passes = PassPipeline(tuple(pass_class(one.name)() for one in traced.records))
    notes = [note for record in traced.records for note in record.notes]
    records = site_records([site for _, site in there], passes, notes)
    found = []
    for (node, site), record in zip(there, records, strict=True):
        one, action, reason = (
            predicted.get(without_repeat(site.name)),
            record.action,
            record.reason,
        )
        if one and one.kept_dense:
            reason += f"; here it would run dense: {one.kept_dense}"
        found.append(
            {
                "graph": index,
                "name": site.name,
                "source": site.where,
                "role": site.role,
                "grid": sizes(site.q_grid),
                "segments": _segments(site),
                "action": action,
                "reason": reason,
                "provider": one and one.provider,
                "density": one and one.density,
                "why": site.reason,
                "flops": cost.flops(node),
            }
        )
    return found


def _segments(site: AttentionSite) -> list[dict[str, Any]]:
    return [
        {"role": segment.role, "grid": sizes(segment.grid), "why": segment.why}
        for segment in site.segments
    ]


def _steps(traced: TracedGraph, index: int) -> list[dict[str, Any]]:
    """List the denoising steps of an unrolled loop, or the call that is one as a whole."""
    from lipass.passes.graph.marks import step_of

    members: dict[tuple[int, int], int] = {}
    for node in traced.facts.graph.nodes:
        if step := step_of(node):
            members[step.index, step.steps] = members.get((step.index, step.steps), 0) + 1
    said = ("kept", "no pass of the pipeline guards steps")
    for record in traced.records:
        for note in record.notes:
            if note.site in ("steps", "call") and note.action != "found":
                said = (note.action, note.reason)
    rows: list[dict[str, Any]] = [
        {"step": step, "steps": steps, "nodes": nodes} for (step, steps), nodes in members.items()
    ]
    if not rows and said[0] == "rewritten":
        rows = [{"step": None, "steps": None, "nodes": len(traced.facts.graph.nodes)}]
    return [{"graph": index, **row, "action": said[0], "reason": said[1]} for row in rows]


def _poses(graph: torch.fx.Graph, index: int) -> list[dict[str, Any]]:
    from lipass.passes.attention.site import poses

    return [
        {
            "graph": index,
            "input": node.name,
            "history_latents": str(fact.history_latents),
            "current_latents": str(fact.current_latents),
            "why": fact.why,
        }
        for node, fact in poses(graph)
    ]


def _inputs(graph: torch.fx.Graph) -> list[dict[str, Any]]:
    """List the tensors that a call passes; parameters are counted on one line."""
    import torch

    from lipass.passes.graph.compat import hint, is_parameter, value

    rows, parameters = [], 0
    for node in graph.find_nodes(op="placeholder"):
        if not isinstance(value(node), torch.Tensor):
            continue
        if is_parameter(node):
            parameters += hint(value(node).numel())
            continue
        rows.append({"name": node.name, "shape": sizes(value(node).shape)})
    return [*rows, {"name": "parameters", "shape": [parameters]}]


def _layers(graph: torch.fx.Graph) -> list[dict[str, Any]]:
    """Group the nodes by layer: the module path up to its first number, and the step."""
    from lipass.passes.attention.site import site_of
    from lipass.passes.graph.marks import step_of
    from lipass.passes.graph.names import module_path

    layers: dict[tuple[int | None, str], dict[str, Any]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        step = step_of(node)
        path, _, repeat = module_path(node).partition("@")
        name = _layer_name(path) + (f"@{repeat}" if repeat else "")
        layer = layers.setdefault(
            (step.index if step else None, name),
            {
                "name": name,
                "step": step and step.index,
                "nodes": 0,
                "flops": 0,
                "attention_flops": 0,
                "sites": [],
            },
        )
        work = cost.flops(node)
        layer["nodes"] += 1
        layer["flops"] += work
        if site := site_of(node):
            layer["attention_flops"] += work
            layer["sites"].append(site.name)
    return list(layers.values())


def _layer_name(path: str) -> str:
    match = re.match(r"(.*?\b\d+)\b", path)
    return match.group(1) if match else path.partition(".")[0] or "model"
