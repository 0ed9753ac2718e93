"""Turn `module:callable` or `file.py:callable` into a model and its calls, weightless if asked."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lipass.cli import UsageError
from lipass.errors import LipassError

HELP = (
    "module:callable or file.py:callable; returns (model, inputs), inputs being a tuple of "
    "arguments, a dict of keyword arguments, or a list of those for several calls"
)


@dataclass(frozen=True)
class Target:
    """Hold what a target's callable made.

    Attributes:
        text: the target as it was written.
        model: module or function.
        calls: arguments of each call, a tuple or a dict.
        mode: the fake mode that the tensors belong to; None where they are real.
    """

    text: str
    model: Callable[..., Any]
    calls: list[tuple[Any, ...] | dict[str, Any]]
    mode: Any = None

    def active(self) -> AbstractContextManager[Any]:
        """Enter the fake mode, where there is one."""
        return self.mode or contextlib.nullcontext()

    def call(self, fn: Callable[..., Any], index: int) -> Any:
        """Call `fn` with the arguments of one call."""
        given = self.calls[index]
        return fn(**given) if isinstance(given, dict) else fn(*given)


def add_arguments(parser: argparse.ArgumentParser, *, presets: bool = False) -> None:
    """Declare what every command on a target takes; `presets` if it takes several."""
    parser.add_argument("target", metavar="TARGET", help=HELP)
    if presets:
        parser.add_argument(
            "--preset",
            action="append",
            default=[],
            help="passes to run (default: all); may be repeated",
        )
    else:
        parser.add_argument("--preset", default="all", help="passes to run (default: all)")
    parser.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the backend, such as sparse.budget_decode=0.3; may be repeated",
    )
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="PASS",
        help="run this pass behind those that rewrite, such as one that another package "
        "registers; may be repeated",
    )
    parser.add_argument("--dynamic", action="store_true", help="compile with dynamic shapes")


def add_fake_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how tensors are made, for commands that need no values."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--fake",
        dest="fake",
        action="store_true",
        default=None,
        help="make tensors without memory or values; fail where the callable needs values",
    )
    how.add_argument(
        "--real",
        dest="fake",
        action="store_false",
        help="make real tensors (default: fake ones, real ones where the callable needs values)",
    )


def options_of(args: argparse.Namespace, preset: str | None = None) -> dict[str, Any]:
    """Collect the options of the backend, for this preset or the one that was given.

    Raises:
        UsageError: for an option that is not `KEY=VALUE`.
    """
    return {"preset": preset or args.preset, **dict(map(_option, args.option))}


def load(text: str, fake: bool = False) -> Target:
    """Import the callable of a target and call it.

    Args:
        text: the target.
        fake: call it so that every tensor it makes has a shape and a device, but no memory.

    Raises:
        UsageError: for a target that cannot be imported, or that returns something else.
        LipassError: if the callable raises; the cause is chained.
    """
    build = import_callable(text)
    mode = None
    if fake:
        from torch._subclasses.fake_tensor import FakeTensorMode

        mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        # What a model prints must not end up in a JSON document.
        from lipass.cli.fakes import casts_of_fakes

        with contextlib.redirect_stdout(sys.stderr), casts_of_fakes(mode):
            made = build()
    except Exception as error:
        raise LipassError(f"{text} must return (model, inputs), and {raised(error)}") from error
    if not (
        isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], tuple | dict | list)
    ):
        raise UsageError(
            f"{text} must return (model, inputs), got {type(made).__name__}; inputs is a tuple, "
            "a dict, or a list of those"
        )
    model, inputs = made
    return Target(text, model, inputs if isinstance(inputs, list) else [inputs], mode)


def raised(error: BaseException) -> str:
    """Say what was raised and where, on one line."""
    while (cause := getattr(error, "inner_exception", None)) is not None:
        error = cause  # what Dynamo wraps
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    first = str(error).strip().partition("\n")[0]
    return f"raised {type(error).__name__}{where}: {first}"


def _option(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found:
        raise UsageError(f"an option must be KEY=VALUE, got {text!r}; try -o sparse.tile=4,4,4")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def import_callable(text: str) -> Callable[[], Any]:
    """Import the callable of a target.

    Raises:
        UsageError: for a target that cannot be imported.
    """
    where, found, name = text.rpartition(":")
    if not found or not where or not name:
        raise UsageError(
            f"TARGET must be module:callable or file.py:callable, got {text!r}; "
            "try my_model.py:build"
        )
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    build = getattr(module, name, None)
    if not callable(build):
        raise UsageError(f"{where} must define the callable {name!r}, and does not; see --help")
    return build


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"the file of TARGET must exist, got {str(path)!r}; check the path")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"the file of TARGET must be Python, got {str(path)!r}; check the name")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise LipassError(f"{path} must be importable, and {raised(error)}") from error
    return module


def _load_module(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"the module of TARGET must be importable, got {error}") from error
