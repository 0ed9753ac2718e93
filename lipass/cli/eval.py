"""Roll methods out through scenes, and say what each costs in pictures, along walks and in time.

Without a target, TinyWorld in held-out rooms: presets beside what a loop saves by itself. Results
are written rollout by rollout, and a run that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipass.cli import OK, UsageError
from lipass.cli.outputs import check_file, write_all
from lipass.cli.progress import progress

if TYPE_CHECKING:
    from lipass.quality.results import Results
    from lipass.quality.subject import Subject

SUMMARY = "measure what presets cost in quality, beside the simplest loops that save as much"
SCHEMA_VERSION = 1
_WORLDS = {"small": "evaluated", "stream": "stream_evaluated"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass eval`."""
    parser.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help="file.py:callable or module:callable that returns a lipass.quality.subject.Subject, "
        "for a model of your own; its methods and walks are its own",
    )
    parser.add_argument(
        "--model",
        choices=tuple(_WORLDS),
        help="of TinyWorld: small encodes its memory anew for each chunk, stream keeps keys in a "
        "cache (default: small)",
    )
    scope = parser.add_mutually_exclusive_group()
    for name, meaning in (
        ("quick", "off, all, reference and loops in one room without the Inductor compiler: "
         "pictures are those of the compiled model, times are not"),
        ("long", "64 chunks, for what happens along a walk: drift, seams and loop score"),
    ):  # fmt: skip
        scope.add_argument(
            f"--{name}", dest="scope", action="store_const", const=name, help=meaning
        )
    parser.set_defaults(scope="main")
    for name, metavar, meaning in (
        ("method", "NAME", "a preset, or a loop such as '2 steps'"),
        ("trajectory", "NAME", "such as left/right, loop, 'fast turn', fog, door, long"),
        ("regime", "NAME", "explored or free"),
    ):
        parser.add_argument(
            f"--{name}", action="append", metavar=metavar,
            help=f"{meaning}, in place of those of the scope; may be repeated",
        )  # fmt: skip
    parser.add_argument("--rooms", type=int, nargs="+", metavar="N", help="seeds of rooms")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds of noise")
    parser.add_argument("--inner", choices=("inductor", "eager"), help="what compiles the graphs")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="results, a line a rollout; a run goes on from what is there (default: eval.jsonl, "
        "with the names of model and scope)",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document and nothing else on stdout"
    )
    parser.add_argument(
        "--html", type=Path, metavar="PAGE", help="write a page with worst and typical pictures"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")


def run(args: argparse.Namespace) -> int:
    """Roll out what is missing, then tell."""
    if args.out is None:
        parts = ("eval", args.model, args.scope if args.scope != "main" else None)
        args.out = Path("-".join(filter(None, parts)) + ".jsonl")
    check_file(args.out, "--out")
    check_file(args.html, "--html")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads must be at least 1, got {args.threads}; leave it out")
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    from lipass.quality.results import Results
    from lipass.quality.run import evaluate, missing

    # What a model prints must not end up in a JSON document.
    with contextlib.redirect_stdout(sys.stderr):
        subject = _own_subject(args) if args.target else _tinyworld(args)
        configuration = _configuration(subject)
    with Results(args.out, configuration) as results:
        todo = sum(len(methods) for _, methods in missing(subject, results))
        begin = time.perf_counter()
        if todo:
            with contextlib.redirect_stdout(sys.stderr), progress("eval", todo) as advance:
                evaluate(subject, results, advance)
        _tell(args, subject, results, time.perf_counter() - begin)
    return OK


def _configuration(subject: Subject) -> dict[str, Any]:
    """Say what results depend on; threads and versions do for a model of one's own too."""
    from importlib import metadata

    import torch

    import lipass

    versions = {"lipass": lipass.__version__, "torch": metadata.version("torch")}
    own = dict(subject.settings)
    return {
        "model": subject.name,
        "methods": list(subject.methods),
        "cases": [list(case) for case in subject.cases],
        "settings": {"threads": torch.get_num_threads(), "versions": versions, **own},
    }


def _tell(args: argparse.Namespace, subject: Subject, results: Results, seconds: float) -> None:
    from lipass.quality.page import page
    from lipass.quality.summary import rows, summary
    from lipass.quality.table import table

    dense = subject.methods[0]
    found = summary(results, dense)
    if args.json:
        document = {
            "schema_version": SCHEMA_VERSION,
            "model": subject.name,
            "settings": results.configuration["settings"],
            "seconds": seconds,
            "rows": rows(results, subject.name),
            "summary": found,
        }
        print(json.dumps(document))
    else:
        print(table(found, dense))
        print(f"\n{args.out} has each rollout; --json prints all figures, --html PAGE pictures.")
    if args.html is not None:
        title = f"{subject.name}: {len(subject.methods)} methods, {len(subject.cases)} walks"
        told = page(title, _where(subject), found, results.entries, dense)
        write_all([(args.html, lambda: told)])


def _where(subject: Subject) -> str:
    simple = {
        key: value for key, value in subject.settings.items() if isinstance(value, str | int)
    }
    return ", ".join(f"{key} {value}" for key, value in simple.items())


def _own_subject(args: argparse.Namespace) -> Subject:
    """Build the subject of a target.

    Raises:
        UsageError: options that are TinyWorld's.
        LipassError: it raises, or returns something else.
    """
    from lipass.cli.failures import failing
    from lipass.cli.importing import import_callable
    from lipass.errors import LipassError

    own = ("model", "method", "trajectory", "regime", "rooms", "seeds", "inner")
    given = [f"--{name}" for name in own if getattr(args, name) is not None]
    if given or args.scope != "main":
        raise UsageError(
            f"a target brings its methods and walks, got {(given or ['--' + args.scope])[0]} "
            f"beside {args.target}; leave it out"
        )
    build = import_callable(args.target)
    with failing("must build a subject", args.target):
        subject = build()
    needed = ("name", "methods", "cases", "settings", "scene", "roll_out")
    lacks = [name for name in needed if not hasattr(subject, name)]
    if lacks or not subject.methods or not subject.cases:
        raise LipassError(
            f"{args.target} must return a lipass.quality.subject.Subject with methods and cases, "
            f"got {type(subject).__name__} without {', '.join(lacks) or 'any'}; see docs/eval.md"
        )
    return subject


def _tinyworld(args: argparse.Namespace) -> Subject:
    """Build TinyWorld with the methods and walks that were asked for.

    Raises:
        UsageError: no such method, trajectory or regime.
    """
    from importlib import import_module

    from lipass.cli.toolchain import check_compiler

    world = import_module(f"lipass.examples.tinyworld.{_WORLDS[args.model or 'small']}")
    scope = world.SCOPES[args.scope]
    asked: dict[str, Any] = {
        "methods": args.method,
        "trajectories": args.trajectory,
        "regimes": args.regime,
        "rooms": args.rooms,
        "seeds": args.seeds,
        "inner": args.inner,
    }
    known = {
        "methods": world.METHODS,
        "trajectories": world.TRAJECTORIES,
        "regimes": world.REGIMES,
    }
    for what, names in known.items():
        for name in asked[what] or ():
            if name not in names:
                raise UsageError(
                    f"{what} must be of {', '.join(map(repr, names))}, got {name!r}; see --help"
                )
    chosen = {
        key: value if isinstance(value, str) else tuple(dict.fromkeys(value))
        for key, value in asked.items()
        if value is not None
    }
    if "methods" in chosen:  # the dense model first, as all is compared with it
        chosen["methods"] = tuple(dict.fromkeys((world.DENSE, *chosen["methods"])))
    scope = dataclasses.replace(scope, **chosen)
    if scope.inner == "inductor":
        check_compiler()
    subject: Subject = world.subject(scope)
    return subject
