"""Find which options of a model are worth their time, and write them down for graphs and sessions.

The callable returns (model, roll_out, walks), or options behind them: a module, a function
(model, walk, session) that returns what was generated as a tensor, training walks in a list or a
dict by name, and what is true of all of them, such as the camera.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lipass.cli import OK, UsageError
from lipass.cli.outputs import check_file, write_all
from lipass.cli.target import add_options, options_given

SUMMARY = "find which options of a model are worth their time, for a frame rate or a quality"

SCHEMA_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass calibrate`."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="module:callable or file.py:callable; returns (model, roll_out, walks) or "
        "(model, roll_out, walks, options)",
    )
    add_options(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("frontier.toml"),
        metavar="FILE",
        help="what graphs and sessions read (default: frontier.toml); tries are kept in "
        "FILE.tries, from which a second call goes on",
    )
    parser.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        metavar="FILE",
        help="an earlier frontier, whose points are tried first",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture of it")
    parser.add_argument(
        "--tries",
        type=_at_least_one,
        default=40,
        metavar="N",
        help="choices of options (default: 40)",
    )
    parser.add_argument(
        "--repeats",
        type=_count,
        default=3,
        metavar="N",
        help="timed rollouts of each point, in turn with the dense model (default: 3)",
    )
    parser.add_argument(
        "--default-db",
        type=float,
        default=38.0,
        metavar="DB",
        help="the default point is the fastest that has so many dB (default: 38)",
    )
    parser.add_argument(
        "--frames",
        type=_count,
        default=24,
        metavar="N",
        help="history latents of which is asked what each is worth, 0 asks none (default: 24)",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="roll the model out as it is, uncompiled"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the frontier and show it."""
    check_file(args.out, "--out")
    check_file(args.svg, "--svg")
    given = options_given(args)
    from lipass.calibration.calibrate import calibrate
    from lipass.calibration.frontier import Frontier, writer
    from lipass.calibration.told import table
    from lipass.cli.progress import progress
    from lipass.config import Config

    writer()  # missing, it is better told before an hour of work
    with _asked_for():
        earlier = None if args.earlier is None else Frontier.load(args.earlier)
    model, roll_out, walks, options = _load(args.target)
    with _asked_for():
        Config.resolve(None, {**options, **given})
    total = args.tries + args.frames
    # What a model prints must not end up in a JSON document.
    with contextlib.redirect_stdout(sys.stderr), progress("calibrate", total) as advance:
        found = calibrate(
            model,
            roll_out,
            walks,
            options={**options, **given},
            tries=args.tries,
            repeats=args.repeats,
            default_db=args.default_db,
            frames=args.frames,
            compiled=not args.no_compile,
            keep=args.out.with_name(f"{args.out.name}.tries"),
            earlier=earlier,
            advance=advance,
        )
    found.frontier.save(args.out)
    print(f"wrote {args.out}", file=sys.stderr)
    if args.json:
        print(json.dumps({"schema_version": SCHEMA_VERSION, **found.to_dict()}, indent=1))
    else:
        print(table(found, str(args.out)))
    if args.svg is not None:
        from lipass.calibration.picture import picture

        write_all([(args.svg, lambda: picture(found))])
    return OK


@contextlib.contextmanager
def _asked_for() -> Iterator[None]:
    """Tell what is wrong with what was asked for as such."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _load(text: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    from lipass.cli.failures import failing
    from lipass.cli.importing import import_callable

    build = import_callable(text)
    with (
        failing("must return (model, roll_out, walks)", text),
        contextlib.redirect_stdout(sys.stderr),
    ):
        made: Any = build()
    if not isinstance(made, tuple) or len(made) not in (3, 4):
        got = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise UsageError(
            f"{text} must return (model, roll_out, walks), or options behind them, got {got}; see "
            "docs/calibrate.md"
        )
    return (*made, {}) if len(made) == 3 else made


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number must be 1 or more, got {text!r}; try 40")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number must be 0 or more, got {text!r}; try 3")
    return int(text)
