"""Roll out TinyWorld with several presets and report speed, quality and every rewrite."""

from __future__ import annotations

import argparse
from pathlib import Path

from lipass.cli import UsageError
from lipass.cli.outputs import check_folder
from lipass.cli.toolchain import check_compiler

SUMMARY = "roll out a trained world model with several presets and write a report"

_ALSO = ("inductor", "exact", "context", "sparse", "cache", "reference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass demo`."""
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument(
        "--full",
        dest="scope",
        action="store_const",
        const="full",
        help="all trajectories, both regimes, all presets and plain inductor",
    )
    scope.add_argument(
        "--quick",
        dest="scope",
        action="store_const",
        const="quick",
        help="a few chunks without the Inductor compiler, to see that everything works",
    )
    parser.set_defaults(scope="main")
    parser.add_argument(
        "--also",
        action="append",
        choices=_ALSO,
        default=[],
        metavar="PRESET",
        help=f"one more beside off and all: {', '.join(_ALSO)}; may be repeated",
    )
    parser.add_argument(
        "--model",
        choices=("small", "stream"),
        default="small",
        help="small encodes its memory anew for each chunk; stream keeps keys in a cache, and is "
        "shown dense, with a window, and as poses choose (default: small)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document and nothing else on stdout"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="where report.html, PNGs and receipt.json go (default: demo)",
    )
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: what torch chooses)"
    )


def run(args: argparse.Namespace) -> int:
    """Delegate to the example, which owns the model, the presets and the report."""
    check_folder(args.out, "--out")
    if args.scope != "quick":
        check_compiler()
    if args.model == "stream":
        if args.also:
            raise UsageError(
                f"--also adds presets to the model small, got {args.also[0]!r} with stream; "
                "leave it out"
            )
        from lipass.examples.tinyworld import stream_demo

        return stream_demo.run(
            scope=args.scope, out=args.out, as_json=args.json, threads=args.threads
        )
    from lipass.examples.tinyworld import demo

    return demo.run(
        scope=args.scope,
        presets=tuple(args.also),
        out=args.out,
        as_json=args.json,
        threads=args.threads,
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"threads must be at least 1, got {text!r}; try 2")
    return int(text)
