"""Lay text out for a terminal of 80 columns; colour only where somebody sees it."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence

WIDTH = 80
_COLOURS = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "blue": 34, "cyan": 36}


def paint(text: str, *colours: str) -> str:
    """Colour a text, unless stdout is no terminal or the user asked for none."""
    if not colours or not text or not _has_colour():
        return text
    codes = ";".join(str(_COLOURS[colour]) for colour in colours)
    return f"\x1b[{codes}m{text}\x1b[0m"


def columns(rows: Sequence[Sequence[str]], indent: int = 2) -> list[str]:
    """Align rows; the first column gives way where a row would be too long."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    others = sum(width + 2 for width in widths[1:]) + indent
    widths[0] = min(widths[0], max(WIDTH - others, 16))
    lines = []
    for row in rows:
        cells = [cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return lines


def cut(text: str, width: int) -> str:
    """Shorten a name from the front, where layers differ least."""
    return text if len(text) <= width else ".." + text[len(text) - width + 2 :]


def paragraph(text: str, indent: int, hanging: int = 0) -> list[str]:
    """Wrap a sentence; what has no spaces may stick out, so that it can be copied.

    Args:
        text: the sentence.
        indent: spaces in front of each line.
        hanging: more of them in front of all but the first.
    """
    pad = " " * indent
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=pad,
        subsequent_indent=pad + " " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [pad.rstrip()]


def diff_line(line: str) -> str:
    """Colour one line of a diff."""
    return paint(line, {"+": "green", "-": "red"}[line[0]]) if line[:1] in ("+", "-") else line


def _has_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and _can_colour()


def _can_colour() -> bool:
    return os.environ.get("TERM", "") != "dumb"
