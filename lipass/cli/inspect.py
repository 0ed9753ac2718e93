"""Show what each pass finds and does in a model: attention sites, steps, poses, and why not."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from lipass.cli import NOTHING_MATCHED, OK, repro, target
from lipass.cli.outputs import check_file, write_all

SUMMARY = "show what each pass finds and does in a model, and why not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass inspect`."""
    target.add_arguments(parser)
    target.add_fake_arguments(parser)
    parser.add_argument("--diff", action="store_true", help="show what each pass changed")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that stands alone")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture of the graphs")
    repro.add_arguments(parser)
    parser.add_argument(
        "--strict", action="store_true", help="exit with 3 if no attention site is found"
    )


def run(args: argparse.Namespace) -> int:
    """Trace the target's calls, run the passes and show what they noted."""
    from lipass.cli.findings import Findings
    from lipass.cli.inspect_table import render
    from lipass.cli.next_steps import next_steps
    from lipass.cli.tracing import pipeline_for, trace_target

    check_file(args.html, "--html")
    check_file(args.svg, "--svg")
    pipeline = pipeline_for(target.options_of(args), args.add)
    findings, repros = Findings(), repro.Repros(args.emit_repro, args.target, pipeline)
    trace = trace_target(
        args.target,
        pipeline,
        fake=args.fake,
        dynamic=args.dynamic or None,
        observers=(findings, repros),
    )
    document = findings.document(args.target, args.preset, pipeline, trace)
    document["next"] = next_steps(document)
    # Printed first: a file that cannot be written loses nothing.
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        print(render(document, show_diff=args.diff))
    files: list[tuple[Path, Callable[[], str]]] = []
    if args.svg is not None:
        from lipass.cli.inspect_svg import picture

        files.append((args.svg, lambda: picture(document, alone=True)))
    if args.html is not None:
        from lipass.cli.inspect_page import page

        files.append((args.html, lambda: page(document, findings.texts)))
    write_all(files)
    repros.write()
    if args.strict and not document["sites"]:
        print("lipass inspect: no attention site was found in any graph", file=sys.stderr)
        return NOTHING_MATCHED
    return OK
