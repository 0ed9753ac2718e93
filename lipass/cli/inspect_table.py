"""Print the document of `lipass inspect` on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lipass.cli.terminal import columns, diff_line, paint, paragraph
from lipass.folding import folded, layer_kind, same_reason

_ACTION_COLOURS = {"rewritten": "green", "kept": "yellow", "found": "blue"}


def render(document: dict[str, Any], show_diff: bool = False) -> str:
    """Return the table: a block a graph, then what kept Dynamo from making one graph."""
    return "\n".join(_lines(document, show_diff))


def shape(sizes: Iterable[Any] | None) -> str:
    """Print sizes as `4x8x8`."""
    return "x".join(map(str, sizes)) if sizes else "?"


def alike(sites: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group the sites that differ in the numbers of their names only, as equal layers do."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for site in sites:
        keys = tuple((part["role"], shape(part["grid"])) for part in site["segments"])
        where, reason = layer_kind(site["name"]), same_reason(site["reason"])
        told = (site["role"], shape(site["grid"]), keys, site["action"], reason)
        groups.setdefault((site["graph"], where, *told), []).append(site)
    return list(groups.values())


def group_name(group: list[dict[str, Any]]) -> str:
    """Name a group of sites: `blocks.0-53.attn1`."""
    return folded([site["name"] for site in group])


def work(flops: float) -> str:
    """Print FLOPs with a prefix."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= size:
            return f"{flops / size:.3g} {prefix}FLOP"
    return f"{flops / 1e3:.3g} kFLOP"


def _lines(document: dict[str, Any], show_diff: bool) -> Iterator[str]:
    how = "fake tensors" if document["fake"] else "real tensors"
    yield paint(document["target"], "bold")
    yield f"preset {document['preset']}, {how}, {document['seconds']:.1f} s"
    for graph in document["graphs"]:
        yield ""
        yield from _graph(document, graph, show_diff)
    if not document["graphs"]:
        yield "no graph: Dynamo compiled nothing of the target"
    if document["graph_breaks"]:
        yield ""
        yield paint(_count(len(document["graph_breaks"]), "graph break"), "bold")
        for found in document["graph_breaks"]:
            yield f"  {paint(found['source'], 'red')}"
            yield from paragraph(found["reason"], 4)
            yield from paragraph(f"remedy: {found['remedy']}", 4)
    if document["next"]:
        yield ""
        yield paint("what to do next", "bold")
        for step in document["next"]:
            yield from paragraph(f"- {step}", 2, hanging=2)


def _graph(document: dict[str, Any], graph: dict[str, Any], show_diff: bool) -> Iterator[str]:
    def own(key: str) -> list[dict[str, Any]]:
        return [entry for entry in document[key] if entry["graph"] == graph["graph"]]

    sites, steps, passes = own("sites"), own("steps"), own("passes")
    rewritten = sum(site["action"] == "rewritten" for site in sites)
    title = f"graph {graph['graph']}: {graph['nodes']} nodes"
    yield paint(f"{title}, {_count(len(sites), 'attention site')}, {rewritten} rewritten", "bold")
    yield from _cost(graph)
    if sites:
        yield ""
        yield from _sites(alike(sites))
    facts = [f"poses   {pose['input']}: {pose['why']}" for pose in own("poses")]
    facts += [f"steps   {_steps(steps)}"] if steps else []
    if facts:
        yield ""
        for fact in facts:
            yield from paragraph(fact, 2)
    if passes:
        yield ""
    for one in passes:
        verdict = "changed" if one["changed"] else "unchanged"
        name = paint(one["name"], "bold" if one["changed"] else "dim")
        yield f"  {name} ({one['numerics']}): {verdict}, {one['seconds'] * 1e3:.0f} ms"
        yield from _notes(one["notes"])
        if show_diff:
            yield from (f"    {diff_line(line)}" for line in one["diff"].splitlines())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _cost(graph: dict[str, Any]) -> Iterator[str]:
    before, after = graph["flops"], graph["flops_after"]
    if not before:
        return
    share = f", {(1 - after / before):.0%} less" if after < before else ""
    yield f"  {work(before)} before, {work(after)} after{share}"


def _sites(groups: list[list[dict[str, Any]]]) -> Iterator[str]:
    """One row for all layers of which the same is true, keys and reason on the lines below."""
    rows = [("site", "n", "role", "grid", "action", "density", "by")]
    for group in groups:
        site = group[0]
        density = "" if site["density"] is None else f"{site['density']:.2f}"
        rows.append(
            (
                group_name(group),
                str(len(group)),
                site["role"],
                shape(site["grid"]),
                site["action"],
                density,
                site["provider"] or "",
            )
        )
    head, *lines = columns(rows)
    yield paint(head, "dim")
    for line, group in zip(lines, groups, strict=True):
        site = group[0]
        colour = _ACTION_COLOURS.get(site["action"])
        yield line.replace(site["action"], paint(site["action"], *[colour] if colour else []))
        keys = " | ".join(f"{part['role']} {shape(part['grid'])}" for part in site["segments"])
        where = site["source"] or "no source line"
        yield from paragraph(f"{where}: keys {keys}" if keys else where, 6)
        yield from paragraph(site["reason"], 6)


def _steps(steps: list[dict[str, Any]]) -> str:
    first = steps[0]
    count = "the whole call is one" if first["step"] is None else f"{len(steps)} in the graph"
    return f"{count}, {first['action']}: {first['reason']}"


def _notes(notes: list[dict[str, Any]]) -> Iterator[str]:
    """Print notes that say the same of many sites, as equal layers have, once."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for note in notes:
        key = (note["action"], same_reason(note["reason"]))
        groups.setdefault(key, []).append(note)
    for (action, _), told in groups.items():
        sites, reason = list(dict.fromkeys(note["site"] for note in told)), told[0]["reason"]
        where = folded(sites) + (f" x{len(sites)}" if len(sites) > 1 else "")
        first, *rest = paragraph(f"{action:<9} {where}: {reason}", 4, hanging=10)
        colour = _ACTION_COLOURS.get(action)
        yield first.replace(action, paint(action, *[colour] if colour else []), 1)
        yield from rest
