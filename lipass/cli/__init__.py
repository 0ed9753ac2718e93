"""Run the command line: one file per command, imported without importing torch."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from lipass._version import VERSION
from lipass.errors import LipassError

OK, FAILURE, USAGE, NOTHING_MATCHED, INTERRUPTED = 0, 1, 2, 3, 130
COMMANDS = ("demo", "warmup", "inspect", "diff", "explain", "bisect", "options", "doctor")


class UsageError(ValueError):
    """Report arguments that parse and still cannot be used, in the form rule, value, remedy."""


def main(argv: list[str] | None = None) -> int:
    """Parse `argv`, run one command and return its exit code.

    0 is success, 1 a failure, 2 wrong usage, 3 "nothing matched" under `--strict`, 130 that
    it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="lipass", description="Make interactive video world models fast, and show how."
    )
    parser.add_argument("--version", action="version", version=f"lipass {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"lipass.cli.{name}")
        command = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    try:
        args = parser.parse_args(argv)
    except SystemExit as leaving:  # argparse leaves by exception, for --help too
        return leaving.code if isinstance(leaving.code, int) else USAGE
    try:
        return args.run(args)
    except UsageError as error:
        print(f"lipass {args.command}: {error}", file=sys.stderr)
        return USAGE
    except LipassError as error:
        print(f"lipass {args.command}: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print(f"lipass {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
