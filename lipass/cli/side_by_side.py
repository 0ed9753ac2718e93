"""Set two printed graphs beside each other, cut to the lines around what changed."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from html import escape

_CONTEXT = 2
# Changes to equal layers look alike; the command line shows all of them.
_HUNKS_SHOWN = 24

Row = tuple[str | None, str | None, bool]


def side_by_side(before: str, after: str) -> str:
    """Return an HTML table; removed lines stand left, new ones right."""
    old, new = before.splitlines(), after.splitlines()
    hunks = list(difflib.SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(
        _CONTEXT
    ))  # fmt: skip
    parts = []
    for hunk in hunks[:_HUNKS_SHOWN]:
        line = hunk[0][1] + 1
        parts.append(f'<tr class="cut"><td colspan="2">line {line}</td></tr>')
        parts += map(_row, _rows(hunk, old, new))
    if len(hunks) > _HUNKS_SHOWN:
        rest = f"{len(hunks) - _HUNKS_SHOWN} more places; lipass diff shows them"
        parts.append(f'<tr class="cut"><td colspan="2">{rest}</td></tr>')
    return f'<div class="diff"><table><tbody>{"".join(parts)}</tbody></table></div>'


def _rows(hunk: list[tuple], old: list[str], new: list[str]) -> Iterator[Row]:
    for kind, start, end, new_start, new_end in hunk:
        changed = kind != "equal"
        for a, b in itertools.zip_longest(old[start:end], new[new_start:new_end]):
            yield a, b, changed


def _row(row: Row) -> str:
    old, new, changed = row
    return f"<tr>{_cell(old, changed * 'gone')}{_cell(new, changed * 'new')}</tr>"


def _cell(text: str | None, kind: str) -> str:
    if text is None:
        return "<td></td>"
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"
