"""Show the graph in front of a pass against the graph behind it."""

from __future__ import annotations

import argparse
import difflib

from lipass.cli import NOTHING_MATCHED, OK, UsageError, target
from lipass.cli.terminal import diff_line, paint

SUMMARY = "show what a pass, or all of them, change in the graph"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass diff`."""
    target.add_arguments(parser)
    target.add_fake_arguments(parser)
    parser.add_argument(
        "--pass", dest="name", metavar="NAME", help="one pass (default: from first to last)"
    )
    parser.add_argument(
        "--context", type=int, default=2, metavar="N", help="equal lines around (default: 2)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 3 if nothing changed in any graph"
    )


def run(args: argparse.Namespace) -> int:
    """Trace the target and print a unified diff for each graph."""
    from lipass.cli.tracing import TracedGraph, pipeline_for, trace_target

    pipeline = pipeline_for(target.options_of(args), args.add)
    names = [one.name for one in pipeline]
    if not names:
        raise UsageError(f"the preset must run a pass, got {args.preset!r}; use --preset all")
    if args.name is not None and args.name not in names:
        raise UsageError(
            f"--pass must be one of {', '.join(names)}, got {args.name!r}; another preset or "
            "--add has more"
        )

    def texts(traced: TracedGraph) -> tuple[str, str]:
        if args.name is None:
            return traced.records[0].before, traced.records[-1].after
        record = traced.records[names.index(args.name)]
        return record.before, record.after

    trace = trace_target(args.target, pipeline, fake=args.fake, dynamic=args.dynamic or None)
    what, changed = args.name or "all passes", False
    for index, traced in enumerate(trace.graphs):
        before, after = (text.splitlines() for text in texts(traced))
        lines = list(difflib.unified_diff(before, after, lineterm="", n=max(args.context, 0)))
        print(paint(f"graph {index}, {what}: {'' if lines else 'no change'}".rstrip(": "), "bold"))
        for line in lines[2:]:
            print(paint(line, "cyan") if line.startswith("@@") else diff_line(line))
        changed = changed or bool(lines)
    return NOTHING_MATCHED if args.strict and not changed else OK
