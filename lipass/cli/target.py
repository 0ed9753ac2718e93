"""Turn `module:callable` or `file.py:callable` into a model and its calls, weightless if asked."""

from __future__ import annotations

import argparse
import ast
import contextlib
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lipass.cli import UsageError
from lipass.cli.failures import failing
from lipass.cli.importing import import_callable

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
    add_options(parser)
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="PASS",
        help="run this pass behind those that rewrite, such as one that another package "
        "registers; may be repeated",
    )
    parser.add_argument("--dynamic", action="store_true", help="compile with dynamic shapes")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare `-o KEY=VALUE`, which `options_given` reads."""
    parser.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the backend, such as sparse.budget_decode=0.3; may be repeated",
    )


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
    return {"preset": preset or args.preset, **options_given(args)}


def options_given(args: argparse.Namespace) -> dict[str, Any]:
    """Collect what `-o` was given.

    Raises:
        UsageError: for an option that is not `KEY=VALUE`.
    """
    return dict(map(_option, args.option))


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
    from lipass.cli.fakes import casts_of_fakes

    # What a model prints must not end up in a JSON document.
    printing = contextlib.redirect_stdout(sys.stderr)
    with failing("must return (model, inputs)", text), printing, casts_of_fakes(mode):
        made = build()
    if not (
        isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], tuple | dict | list)
    ):
        raise UsageError(
            f"{text} must return (model, inputs), got {type(made).__name__}; inputs is a tuple, "
            "a dict, or a list of those"
        )
    model, inputs = made
    if not callable(model):
        raise UsageError(
            f"{text} must return (model, inputs), got a model of kind {type(model).__name__}, "
            "which cannot be called; return a module or a function"
        )
    import torch

    if isinstance(model, torch.nn.Module) and type(model).forward is torch.nn.Module.forward:
        raise UsageError(
            f"{text} must return what is called, got a {type(model).__name__}, which has no "
            "forward; return the method that is called, such as (model.denoise, inputs)"
        )
    calls = inputs if isinstance(inputs, list) else [inputs]
    wrong = [one for one in calls if not isinstance(one, tuple | dict)]
    if wrong or not calls:
        got = f"a list of {type(wrong[0]).__name__}" if calls else "an empty list"
        raise UsageError(
            f"{text} must return (model, inputs), got {got} as inputs; a list holds a tuple of "
            "arguments or a dict of keyword arguments for each call"
        )
    return Target(text, model, calls, mode)


def _option(text: str) -> tuple[str, Any]:
    """Read `KEY=VALUE` as people write it: words for switches, names joined by commas."""
    key, found, value = text.partition("=")
    if not found or not key.strip():
        raise UsageError(f"an option must be KEY=VALUE, got {text!r}; try -o sparse.tile=4,4,4")
    from lipass.config import kind_of

    key, kind = key.strip(), kind_of(key.strip())
    if kind == "bool" and value.lower() in _SWITCHES:
        return key, _SWITCHES[value.lower()]
    if "None" in kind and value.lower() == "none":
        return key, None
    try:
        read = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        read = value
    if kind == "str":
        return key, read if isinstance(read, str) else value
    if kind.startswith("tuple[str") and isinstance(read, str):
        return key, tuple(name.strip() for name in read.split(",") if name.strip())
    if "tuple[int" in kind and isinstance(read, str) and re.fullmatch(r"\d+(x\d+)+", read):
        return key, tuple(map(int, read.split("x")))
    return key, read


_SWITCHES = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
