"""Lay out the figures of all rows, and the attention sites of all presets, as tables."""

import re
from html import escape

from .columns import COLUMNS, Column, by_scene, cell, scene_title
from .palette import page_colour

_SITE_COLUMNS = ("preset", "name", "role", "grid", "action", "reason", "density")


def rows_table(rows: list[dict]) -> str:
    """Return every figure of every row, a block a scene."""
    head = "".join(f"<th>{escape(column.title)}</th>" for column in COLUMNS)
    body = []
    for scene, group in by_scene(rows).items():
        body.append(
            f'<tr class="group"><th colspan="{len(COLUMNS) + 1}">{escape(scene_title(scene))}'
            "</th></tr>"
        )
        body += [_row(row) for row in group]
    return (
        '<section><h2>All figures</h2><div class="scroll"><table class="rows">'
        f"<thead><tr><th>preset</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        "</div></section>"
    )


def _row(row: dict) -> str:
    cells = "".join(f"<td>{_html_cell(column, row)}</td>" for column in COLUMNS)
    colour = page_colour(row["preset"])
    return (
        f'<tr class="row"><th style="--colour:{colour}">{escape(row["preset"])}</th>{cells}</tr>'
    )


def _html_cell(column: Column, row: dict) -> str:
    text = cell(column, row)
    return '<span class="none">-</span>' if text == "-" else escape(text)


def sites_table(sites: list[dict]) -> str:
    """Return the attention sites; layers of which the same is true share a line."""
    if not sites:
        return ""
    keys = [key for key in _SITE_COLUMNS if any(key in site for site in sites)]
    groups: dict[tuple, list[dict]] = {}
    for site in sites:
        alike = {**site, "name": re.sub(r"\d+", "*", str(site["name"]))}
        groups.setdefault(tuple(_plain(alike.get(key)) for key in keys), []).append(site)
    head = "".join(f"<th>{'site' if key == 'name' else key}</th>" for key in keys)
    body = "".join(_site(cells, keys, members) for cells, members in groups.items())
    rewritten = sum(site.get("action") == "rewritten" for site in sites)
    return (
        f"<section><h2>Attention sites</h2><p>{len(sites)} sites, {rewritten} rewritten, "
        f"{len(sites) - rewritten} kept; every one with its reason. Equal layers are one line.</p>"
        f'<div class="scroll"><table class="sites"><thead><tr>{head}<th>layers</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _site(cells: tuple, keys: list[str], members: list[dict]) -> str:
    shown = dict(zip(keys, cells, strict=True))
    if len(members) == 1:
        shown["name"] = str(members[0]["name"])
    names = escape(", ".join(str(site["name"]) for site in members))
    return (
        f'<tr class="{escape(str(members[0].get("action", "")))}" title="{names}">'
        + "".join(f"<td>{escape(text)}</td>" for text in shown.values())
        + f"<td>{len(members)}</td></tr>"
    )


def _plain(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return "x".join(map(_plain, value))
    return str(value)
