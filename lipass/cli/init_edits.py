"""Change some lines of a source and keep the rest as it was written."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from lipass.cli.init_syntax import Function


class Edits:
    """Lines of a file with what is put in front or in place of them; comments stay."""

    def __init__(self, source: str) -> None:
        self._lines = source.splitlines()
        self._before: dict[int, list[str]] = {}
        self._instead: dict[int, list[str]] = {}
        self._gone: set[int] = set()
        self._deeper: set[int] = set()
        self._swaps: list[tuple[int, int, int, str]] = []
        self._text = {
            line
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Constant | ast.JoinedStr)
            for line in range(node.lineno + 1, (node.end_lineno or node.lineno) + 1)
        }

    def indent(self, line: int) -> int:
        """Count the spaces in front of a line."""
        text = self._lines[line - 1]
        return len(text) - len(text.lstrip())

    def header_end(self, node: Function | ast.For | ast.AsyncFor | ast.With) -> int:
        """Return the line with the colon of a `def`, `for` or `with`.

        Raises:
            SyntaxError: the body begins on that line.
        """
        for line in range(node.lineno, node.body[0].lineno):
            if self._lines[line - 1].partition("#")[0].rstrip().endswith(":"):
                return line
        raise SyntaxError(f"line {node.lineno} holds a loop and its body")

    def before(self, line: int, lines: Iterable[str], indent: int) -> None:
        """Put lines in front of one."""
        self._before.setdefault(line, []).extend(" " * indent + one for one in lines)

    def replace(self, first: int, last: int, lines: Iterable[str], indent: int) -> None:
        """Put lines in place of some."""
        self._instead[first] = [" " * indent + one for one in lines]
        self._gone |= set(range(first + 1, last + 1))

    def deeper(self, first: int, last: int) -> None:
        """Indent lines by four."""
        self._deeper |= set(range(first, last + 1))

    def is_deeper(self, line: int) -> bool:
        """Whether a line is indented."""
        return line in self._deeper

    def swap(self, node: ast.expr, text: str) -> None:
        """Put a text in place of an expression on one line."""
        if node.lineno == node.end_lineno and node.end_col_offset is not None:
            self._swaps.append((node.lineno, node.col_offset, node.end_col_offset, text))

    def lines(self, first: int, last: int) -> list[str]:
        """Return the lines of a range as they are now."""
        raw = [line.encode() for line in self._lines]
        for line, start, end, text in sorted(set(self._swaps), reverse=True):
            raw[line - 1] = raw[line - 1][:start] + text.encode() + raw[line - 1][end:]
        out: list[str] = []
        for number in range(first, last + 1):
            pad = " " * 4 * (number in self._deeper)
            out += self._before.get(number, [])
            if number in self._gone:
                continue
            for text in self._instead.get(number, [raw[number - 1].decode()]):
                out.append(pad + text if text.strip() and number not in self._text else text)
        return out
