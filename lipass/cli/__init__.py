"""Run the command line: one file per command, imported without importing torch."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import traceback
from importlib import import_module

from lipass._version import VERSION
from lipass.errors import LipassError

OK, FAILURE, USAGE, NOTHING_MATCHED, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 3, 130, 141
COMMANDS = (
    "demo",
    "eval",
    "play",
    "warmup",
    "calibrate",
    "inspect",
    "diff",
    "explain",
    "bisect",
    "options",
    "doctor",
    "init",
)


class UsageError(ValueError):
    """Report arguments that parse and still cannot be used, in the form rule, value, remedy."""


def main(argv: list[str] | None = None) -> int:
    """Parse `argv`, run one command and return its exit code.

    0 is success, 1 a failure, 2 wrong usage, 3 "nothing matched" under `--strict`, 130 that
    it was interrupted, 141 that nobody reads its output any more. What fails is told in one line;
    `--debug` shows where.
    """
    argv = sys.argv[1:] if argv is None else argv
    command, debug = "", "--debug" in argv
    try:
        parser = argparse.ArgumentParser(
            prog="lipass", description="Make interactive video world models fast, and show how."
        )
        parser.add_argument("--version", action="version", version=f"lipass {VERSION}")
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for name in COMMANDS:
            module = import_module(f"lipass.cli.{name}")
            added = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
            module.add_arguments(added)
            added.add_argument(
                "--debug", action="store_true", help="show the traceback of what fails"
            )
            added.set_defaults(run=module.run)
        try:
            args = parser.parse_args(argv)
        except SystemExit as leaving:  # argparse leaves by exception, for --help too
            return leaving.code if isinstance(leaving.code, int) else USAGE
        command = f" {args.command}"
        code: int = args.run(args)
        sys.stdout.flush()  # a full disk shows here, not behind the interpreter's end
        return code
    except BrokenPipeError:
        _leave_stdout()
        return CLOSED_PIPE
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        said, code = _told(error)
        print(f"lipass{command}: {said}", file=sys.stderr)
        return code


def _told(error: BaseException) -> tuple[str, int]:
    """Say on one line what went wrong, and with which exit code that ends."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, UsageError | LipassError):
        return str(error), USAGE if isinstance(error, UsageError) else FAILURE
    return _unexpected(error), FAILURE


def _unexpected(error: BaseException) -> str:
    """Say on one line what nobody has foreseen."""
    from lipass.cli.failures import raised

    if isinstance(error, OSError) and error.strerror:
        if error.filename is None and error.errno in _OF_WRITING:
            _leave_stdout()
            return f"what is printed must reach its reader, got: {error.strerror}; see to stdout"
        if error.filename is None:
            return f"{raised(error)}; --debug shows the traceback"
        return (
            f"a file must be readable or writable where it is needed, got {error.strerror}: "
            f"{str(error.filename)!r}; check the path, its permissions and the space on its disk"
        )
    return f"{raised(error)}; --debug shows the traceback"


# What a full disk or a reader that is gone says; other calls of the system have errors too.
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def _leave_stdout() -> None:
    """Keep the interpreter from writing again, at its end, to what cannot be written to."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
