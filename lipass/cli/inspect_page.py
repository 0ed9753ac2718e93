"""Lay out an inspected target as one HTML file that needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from typing import Any

from lipass.cli.inspect_svg import picture
from lipass.cli.inspect_table import alike, group_name, shape, work
from lipass.cli.side_by_side import side_by_side

_SITE_HEAD = (
    "site",
    "layers",
    "source",
    "role",
    "grid",
    "keys",
    "action",
    "reason",
    "by",
    "density",
    "FLOP",
)


def page(document: dict[str, Any], texts: list[list[tuple[str, str]]]) -> str:
    """Return the page.

    Args:
        document: of `lipass inspect --json`.
        texts: printed graph in front of and behind each pass, one list per graph.
    """
    assets = files(__package__)
    style, colours, script = (
        (assets / name).read_text(encoding="utf-8")
        for name in ("inspect.css", "picture.css", "inspect.js")
    )
    body = "".join(
        [
            _header(document),
            _pictures(document),
            _sites(document),
            _passes(document, texts),
            _breaks(document["graph_breaks"]),
            _footer(),
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(document['target'])} - lipass inspect</title>"
        f"<style>{style}{colours}</style></head>"
        f"<body><main>{body}</main><script>{script}</script></body></html>"
    )


def _header(document: dict[str, Any]) -> str:
    how = "fake tensors, no weights read" if document["fake"] else "real tensors"
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in _tiles(document)
    )
    return (
        f'<header><p class="brand">lipass inspect</p><h1>{escape(document["target"])}</h1>'
        f'<p class="where">Preset {escape(document["preset"])}, {how}, '
        f"{document['seconds']:.1f} s.</p>"
        f'<div class="tiles">{tiles}</div></header>'
    )


def _tiles(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    sites, graphs = document["sites"], document["graphs"]
    rewritten = sum(site["action"] == "rewritten" for site in sites)
    yield f"{rewritten} / {len(sites)}", "attention sites rewritten"
    before = sum(graph["flops"] for graph in graphs)
    after = sum(graph["flops_after"] for graph in graphs)
    if before:
        # Zero is written without a sign.
        yield f"{round(100 * (after / before - 1)) or 0:d} %", f"work predicted, of {work(before)}"
    for entries, one, several in (
        (document["steps"], "denoising step found", "denoising steps found"),
        (document["poses"], "camera input found", "camera inputs found"),
        (graphs, "graph", "graphs"),
        (document["graph_breaks"], "graph break", "graph breaks"),
    ):
        yield str(len(entries)), one if len(entries) == 1 else several


def _pictures(document: dict[str, Any]) -> str:
    if not document["graphs"]:
        return "<section><h2>Graphs</h2><p>Dynamo compiled nothing of the target.</p></section>"
    return (
        "<section><h2>Graphs</h2><p>A row is a layer, its bar the matrix products of one call; "
        "layers without any are left out. Hover a row for its sites and reasons.</p>"
        f"<figure>{picture(document)}</figure></section>"
    )


def _sites(document: dict[str, Any]) -> str:
    sites = document["sites"]
    if not sites:
        return "<section><h2>Attention sites</h2><p>None was found.</p></section>"
    head = "".join(f"<th>{name}</th>" for name in _SITE_HEAD)
    return (
        "<section><h2>Attention sites</h2><p>Every one with what became of it, and why; equal "
        "layers share a line. Density is the share of key blocks that a call visits, predicted "
        "for this machine.</p>"
        '<input type="search" placeholder="filter sites" aria-label="filter sites">'
        f'<div class="scroll"><table class="sites"><thead><tr>{head}</tr></thead><tbody>'
        f"{''.join(map(_site, alike(sites)))}</tbody></table></div></section>"
    )


def _site(group: list[dict[str, Any]]) -> str:
    site = group[0]
    name = escape(group_name(group))
    if len(group) > 1:
        names = "<br>".join(escape(one["name"]) for one in group)
        name = f"<details><summary>{name}</summary><span>{names}</span></details>"
    keys = "<br>".join(
        f'<span title="{escape(part["why"])}">{escape(part["role"])} '
        f"{escape(shape(part['grid']))}</span>"
        for part in site["segments"]
    )
    density, after = "", ""
    if site["density"] is not None:
        share = site["density"]
        density = f'<span class="meter"><i style="width:{share:.0%}"></i></span>{share:.0%}'
        after = f", then {_bare(site['flops'] * share)}" if share < 1 else ""
    why = f' title="{escape(site["role"])}: {escape(site["why"])}"'
    return (
        f'<tr><th class="mono">{name}</th><td>{len(group)}</td>'
        f'<td class="mono tight">{escape(site["source"])}</td>'
        f"<td{why}>{escape(site['role'])}</td>"
        f'<td class="tight">{escape(shape(site["grid"]))}</td>'
        f'<td class="tight">{keys}</td>'
        f'<td class="action {escape(site["action"])}">{escape(site["action"])}</td>'
        f'<td class="reason">{escape(site["reason"])}</td>'
        f"<td>{escape(site['provider'] or '')}</td>"
        f'<td class="tight">{density}</td>'
        f'<td class="tight">{_bare(site["flops"])}{after}</td></tr>'
    )


def _bare(flops: float) -> str:
    return work(flops).removesuffix("FLOP").strip()


def _passes(document: dict[str, Any], texts: list[list[tuple[str, str]]]) -> str:
    if not document["passes"]:
        return "<section><h2>Passes</h2><p>The preset runs none.</p></section>"
    parts = ["<section><h2>Passes</h2><p>In the order in which they run; each opens to its notes "
             "and to the graph in front of it beside the graph behind it.</p>"]  # fmt: skip
    for graph in document["graphs"]:
        own = [one for one in document["passes"] if one["graph"] == graph["graph"]]
        parts.append(f'<p class="where">graph {graph["graph"]}</p>')
        parts += map(_pass, own, texts[graph["graph"]])
    return "".join([*parts, "</section>"])


def _pass(one: dict[str, Any], text: tuple[str, str]) -> str:
    verdict = "changed" if one["changed"] else "unchanged"
    notes = "".join(_notes(one["notes"]))
    return (
        f'<details class="pass"><summary><b>{escape(one["name"])}</b>'
        f'<span class="tag">{escape(one["numerics"])}</span>'
        f'<span class="tag {verdict}">{verdict}</span>'
        f"<span>{one['seconds'] * 1e3:.0f} ms, {len(one['notes'])} notes</span></summary>"
        f'<div>{notes and f"""<ul class="notes">{notes}</ul>"""}'
        f"{side_by_side(*text) if one['changed'] else ''}</div></details>"
    )


def _notes(notes: list[dict[str, str]]) -> Iterator[str]:
    """Print notes that say the same but for numbers, as equal layers have, once."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for note in notes:
        alike = re.sub(r"\d+", "*", note["reason"])
        groups.setdefault((note["action"], alike), []).append(note)
    for (action, reason), group in groups.items():
        first, last = group[0]["site"], group[-1]["site"]
        where = first if first == last else f"{first} .. {last}"
        where += f" ({len(group)})" if len(group) > 1 else ""
        reasons = {note["reason"] for note in group}
        told = reasons.pop() if len(reasons) == 1 else reason
        yield (
            f'<li><span class="action {escape(action)}">{escape(action)}</span> '
            f"<code>{escape(where)}</code> {escape(told)}</li>"
        )


def _breaks(breaks: list[dict[str, str]]) -> str:
    if not breaks:
        return "<section><h2>Graph breaks</h2><p>None.</p></section>"
    parts = "".join(
        f'<div class="break"><p><code>{escape(found["source"])}</code></p>'
        f"<p>{escape(found['reason'])}</p><p><b>Remedy:</b> {escape(found['remedy'])}</p></div>"
        for found in breaks
    )
    return f"<section><h2>Graph breaks</h2>{parts}</section>"


def _footer() -> str:
    return (
        "<footer><section><p>Work counts matrix products and attention. What is left after a "
        "rewrite is predicted from the block plan; frames that cameras drop at run time come on "
        "top and are not in it.</p></section></footer>"
    )
