"""Assert what the last pass of a pipeline did to a function, and that it may do so."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lipass.testing.tracing import Pipeline, run_passes

# Relative to the magnitude of the output, in fp32: the order of a few hundred additions.
_REORDERED = 1e-5


def graph_diff(
    fn: Callable[..., Any],
    args: Sequence[Any],
    pipeline: Pipeline,
    *,
    grown: Sequence[Any] | None = None,
) -> str:
    """Return the lines that the last pass removes (`-`) and adds (`+`), made for goldens."""
    return run_passes(fn, args, pipeline, grown=grown).diff


def assert_rewrites(
    fn: Callable[..., Any],
    args: Sequence[Any],
    pipeline: Pipeline,
    *,
    removes: str = "",
    adds: str = "",
    grown: Sequence[Any] | None = None,
) -> str:
    """Assert that the last pass rewrites `fn(*args)` and keeps its numerics.

    Outputs are compared with eager ones: equal for `EXACT`, to rounding for `REORDERED`, in shape
    and dtype for `APPROX`.

    Args:
        fn: function or module.
        args: its arguments; those of `grown` are called last, and compared, where there are any.
        pipeline: passes, the last of which is under test.
        removes: text that a removed line must hold.
        adds: text that an added line must hold.
        grown: arguments of a second call with other sizes.

    Returns:
        The diff.

    Raises:
        AssertionError: with the graph, where any of that is not so.
    """
    with torch.no_grad():
        torch.manual_seed(0)
        expected = fn(*(args if grown is None else grown))
        torch.manual_seed(0)
    traced = run_passes(fn, args, pipeline, grown=grown)
    record = traced.records[-1]
    told = "".join(f"\n  {note.site}: {note.action}, {note.reason}" for note in traced.notes)
    if not record.changed or not traced.diff:
        raise AssertionError(
            f"{record.name} must rewrite the graph, and left it as it is{told}\n{record.before}"
        )
    for sign, wanted in (("-", removes), ("+", adds)):
        lines = [line for line in traced.diff.splitlines() if line.startswith(sign)]
        if wanted and not any(wanted in line for line in lines):
            verb = "remove" if sign == "-" else "add"
            raise AssertionError(f"{record.name} must {verb} {wanted!r}, got\n{traced.diff}")
    _compare(traced.outputs, expected, record.numerics)
    return traced.diff


def assert_refuses(
    fn: Callable[..., Any],
    args: Sequence[Any],
    pipeline: Pipeline,
    reason: str = "",
    *,
    grown: Sequence[Any] | None = None,
) -> None:
    """Assert that the last pass leaves `fn(*args)` as it is, and says why.

    Args:
        fn: function or module.
        args: its arguments.
        pipeline: passes, the last of which is under test.
        reason: regular expression that the reason of a note must match; "" for passes that
            find nothing to refuse.
        grown: arguments of a second call with other sizes.

    Raises:
        AssertionError: with the diff or the notes, where that is not so.
    """
    traced = run_passes(fn, args, pipeline, grown=grown)
    record = traced.records[-1]
    if traced.diff:
        raise AssertionError(f"{record.name} must leave the graph as it is, got\n{traced.diff}")
    reasons = [note.reason for note in traced.notes if note.action != "rewritten"]
    if reason and not any(re.search(reason, one) for one in reasons):
        said = "".join(f"\n  {one}" for one in reasons) or " no note"
        raise AssertionError(f"{record.name} must say {reason!r}, got{said}")


def _compare(actual: Any, expected: Any, numerics: str) -> None:
    if numerics == "exact":
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    elif numerics == "reordered":
        torch.testing.assert_close(actual, expected, rtol=_REORDERED, atol=_REORDERED)
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=float("inf"), equal_nan=True)
