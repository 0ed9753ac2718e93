"""Run the command line: `lipass demo`, `lipass inspect`, `lipass doctor`."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Parse `argv`, run one command and return its exit code."""
    raise NotImplementedError
