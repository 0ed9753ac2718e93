"""Find the passes that make a compiled model differ from the eager one."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from lipass.cli import FAILURE, OK, UsageError, target
from lipass.cli.failures import failing, raised
from lipass.cli.target import Target
from lipass.cli.terminal import paint, paragraph
from lipass.cli.toolchain import check_compiler
from lipass.errors import LipassError

if TYPE_CHECKING:
    from lipass.passes.core import Pass, PassPipeline

SUMMARY = "drop passes until the compiled model agrees with the eager one; name the guilty"
SCHEMA_VERSION = 1

# fp32: 23 bits of mantissa and a few hundred additions that change their order.
_TOLERANCE = 1e-4
_INNERS = ("eager", "aot_eager", "inductor")


@dataclass(frozen=True)
class Guilty:
    """Name a pass that moves the output.

    Attributes:
        name: pass name, or `inner` where the model differs without any pass.
        numerics: what the pass promises: exact, reordered or approx; "" for `inner`.
        error: largest difference from eager, as a share of eager's largest value; None where the
            compilation or the call failed.
        failure: what it raised, or nothing.
        may_differ: whether it approximates, and agrees where it is told to leave nothing out.
    """

    name: str
    numerics: str
    error: float | None
    failure: str = ""
    may_differ: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass bisect`."""
    target.add_arguments(parser)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=_TOLERANCE,
        metavar="SHARE",
        help="largest difference, as a share of the largest value of eager's output "
        f"(default: {_TOLERANCE:g})",
    )
    parser.add_argument(
        "--inner", choices=_INNERS, help="inner compiler (default: eager, or that of -o inner=)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Compare, drop passes, and fail if any is guilty."""
    from lipass.cli.tracing import pipeline_for

    if not args.tolerance >= 0:
        raise UsageError(f"--tolerance must be >= 0, got {args.tolerance}; try 1e-4")
    options: dict[str, Any] = {"inner": "eager", **target.options_of(args)}
    if args.inner is not None:
        options["inner"] = args.inner
    pipeline = pipeline_for(options, args.add)
    check_compiler(options["inner"], "--inner eager")
    made = target.load(args.target)
    with contextlib.redirect_stdout(sys.stderr):
        found, kept = bisect(made, options, pipeline, args.tolerance, args.dynamic or None)
    guilty = [one for one in found if not one.may_differ]
    allowed = [one for one in found if one.may_differ]
    if args.json:
        document = {
            "schema_version": SCHEMA_VERSION,
            "target": args.target,
            "pipeline": str(pipeline),
            "tolerance": args.tolerance,
            "guilty": [asdict(one) for one in guilty],
            "approximate": [asdict(one) for one in allowed],
            "agrees": str(kept) if kept is not None else None,
        }
        print(json.dumps(document, indent=1))
    else:
        for one in found:
            word, colour = ("may differ", "yellow") if one.may_differ else ("guilty", "red")
            print(paint(f"{word}: {one.name}", colour) + f" {_told(one)}")
        print("\n".join(paragraph(_verdict(found, kept, pipeline, args.tolerance), 0)))
    return FAILURE if guilty else OK


def bisect(
    made: Target,
    options: dict[str, Any],
    pipeline: PassPipeline,
    tolerance: float,
    dynamic: bool | None = None,
) -> tuple[list[Guilty], PassPipeline | None]:
    """Drop the first pass with which the output differs, until what is left agrees.

    A pass that approximates is tried again with every key visited and every latent kept: where it
    agrees then, what it differs by is what it leaves out.

    Returns:
        The passes that move the output as they were found, and the pipeline without them; None
        where the model differs from eager without any pass.

    Raises:
        LipassError: if the eager model fails.
    """
    from lipass.passes.core import Numerics, PassPipeline
    from lipass.runtime.chosen_context import chosen_by_caller

    with failing("must run without compiling", made.text):
        expected, again = (_outputs(made, lambda model: model) for _ in range(2))
    if not _difference(expected, again) <= tolerance:
        raise LipassError(
            f"the eager model must give the same twice, got outputs of {made.text} that differ by "
            f"{_difference(expected, again):.2g} (inf where one is NaN); return the module or its "
            "method, of which each trial gets a copy: what a function writes to, the next one "
            "begins with"
        )

    def check(passes: tuple[Pass, ...]) -> tuple[float | None, str]:
        said = f"lipass bisect: {', '.join(one.name for one in passes) or 'no pass'}"
        try:
            outputs = _outputs(made, lambda model: _compiled(model, options, passes, dynamic))
        except Exception as error:
            print(f"{said}: {raised(error)}", file=sys.stderr)
            return None, raised(error)
        share = _difference(expected, outputs)
        print(f"{said}: differs by {share:.2g}", file=sys.stderr)
        return share, ""

    guilty: list[Guilty] = []
    left = tuple(pipeline)
    while not _agrees(check(left), tolerance):
        if not guilty and not _agrees(none := check(()), tolerance):
            return [Guilty("inner", "", *none)], None
        count, found = _first_guilty(left, check, tolerance)
        one = left[count - 1]
        may = False
        if one.numerics is Numerics.APPROX and found[0] is not None:
            with chosen_by_caller():
                may = _agrees(check((*left[: count - 1], _all_of_it(one))), tolerance)
        guilty.append(Guilty(one.name, one.numerics.value, *found, may))
        left = _without(left, one)
    return guilty, PassPipeline(left)


def _first_guilty(
    passes: tuple[Pass, ...],
    check: Callable[[tuple[Pass, ...]], tuple[float | None, str]],
    tolerance: float,
) -> tuple[int, tuple[float | None, str]]:
    """Halve the range between a prefix that agrees and one that does not.

    Any prefix is a pipeline that runs, because a pass only needs passes in front of it.
    """
    agrees, differs = 0, len(passes)
    found: tuple[float | None, str] = (None, "")
    while differs - agrees > 1:
        middle = (agrees + differs) // 2
        result = check(passes[:middle])
        if _agrees(result, tolerance):
            agrees = middle
        else:
            differs, found = middle, result
    return differs, found if differs < len(passes) else check(passes)


def _all_of_it(one: Pass) -> Pass:
    """Return the pass told to visit every key."""
    budgets = [field.name for field in fields(one) if field.name.startswith("budget")]
    return replace(one, **dict.fromkeys(budgets, 1.0))


def _without(passes: tuple[Pass, ...], gone: Pass) -> tuple[Pass, ...]:
    """Leave out a pass and all that need it."""
    missing, left = {gone.name}, []
    for one in passes:
        if one is gone or missing & set(one.requires):
            missing.add(one.name)
        else:
            left.append(one)
    return tuple(left)


def _agrees(result: tuple[float | None, str], tolerance: float) -> bool:
    error, _ = result
    return error is not None and error <= tolerance


def _compiled(
    model: Callable[..., Any],
    options: dict[str, Any],
    passes: tuple[Pass, ...],
    dynamic: bool | None,
) -> Callable[..., Any]:
    """Compile with these passes alone; the rest of the way is that of the backend."""
    import functools

    import torch

    from lipass.backend import inner_compile
    from lipass.compile.unit import compile_unit
    from lipass.config import Config
    from lipass.passes.core import PassPipeline

    config, pipeline = Config.resolve(None, options), PassPipeline(passes)
    inner = functools.partial(inner_compile, inner=config.inner)

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return compile_unit(gm, example_inputs, config, pipeline, inner)

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, dynamic=dynamic)


def _outputs(made: Target, wrap: Callable[[Any], Callable[..., Any]]) -> list[Any]:
    """Run all calls on a copy of model and arguments, because both may be written to."""
    import torch
    from torch.utils import _pytree as pytree

    model, calls = copy.deepcopy((made.model, made.calls))
    fresh = Target(made.text, model, calls)
    fn = wrap(model)
    torch.manual_seed(0)
    with torch.no_grad():
        results = [fresh.call(fn, index) for index in range(len(calls))]
    return [x for x in pytree.tree_leaves(results) if isinstance(x, torch.Tensor)]


def _difference(expected: list[Any], outputs: list[Any]) -> float:
    """Return the largest difference of any output, as a share of its largest expected value."""
    if len(expected) != len(outputs):
        return float("inf")
    return max((_share(a, b) for a, b in zip(expected, outputs, strict=True)), default=0.0)


def _share(a: Any, b: Any) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.double(), b.double()
    largest, error = a.abs().max().item(), (a - b).abs().max().item()
    return float("inf") if error != error else error / max(largest, 1e-30)


def _told(one: Guilty) -> str:
    if one.error is None:
        return f"({one.numerics or 'no pass'}) {one.failure}"
    if one.name == "inner":
        return f"differs by {one.error:.2g} without any pass; try another --inner"
    if one.may_differ:
        return f"(approx) differs by {one.error:.2g}; it agrees where nothing is left out"
    return f"({one.numerics}) differs by {one.error:.2g}"


def _verdict(
    found: list[Guilty], kept: PassPipeline | None, pipeline: PassPipeline, tolerance: float
) -> str:
    if kept is None:
        return "verdict: wrong before any pass; no pipeline agrees with eager"
    names = ", ".join(one.name for one in kept) or "no pass"
    guilty = [one.name for one in found if not one.may_differ]
    left = f"what is left agrees with eager within {tolerance:g}: {names}"
    if guilty:
        return f"verdict: wrong, by {' and '.join(guilty)}; {left}"
    if found:
        return f"verdict: sound, only what is left out makes a difference; {left}"
    count = len(tuple(pipeline))
    return f"verdict: sound, all {count} passes agree with eager within {tolerance:g}"
