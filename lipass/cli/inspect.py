"""Show what each pass finds and does in a model: attention sites, steps, poses, and why not."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lipass.cli import FAILURE, NOTHING_MATCHED, OK, UsageError

SUMMARY = "show what each pass finds and does in a model, and why not"
SCHEMA_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass inspect`."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="module:callable or file.py:callable; returns (model, inputs), inputs being a tuple "
        "of arguments, a dict of keyword arguments, or a list of those for several calls",
    )
    parser.add_argument("--preset", default="all", help="passes to run (default: all)")
    parser.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the backend, such as sparse.budget_decode=0.3; may be repeated",
    )
    parser.add_argument("--dynamic", action="store_true", help="compile with dynamic shapes")
    parser.add_argument("--diff", action="store_true", help="show what each pass changed")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 3 if no attention site is found"
    )


def run(args: argparse.Namespace) -> int:
    """Compile the target's calls with the passes only and print what they noted."""
    from lipass.passes.core import PassError

    options = {"preset": args.preset, **dict(map(_option, args.option))}
    model, calls = _load(args.target)
    try:
        # What the model prints must not end up in the JSON document.
        with contextlib.redirect_stdout(sys.stderr):
            graphs = inspect(model, calls, options, dynamic=args.dynamic or None)
    except PassError as error:
        print(f"lipass inspect: {error}", file=sys.stderr)
        return FAILURE
    if args.json:
        document = {"schema_version": SCHEMA_VERSION, "target": args.target, "graphs": graphs}
        print(json.dumps(document, indent=1))
    else:
        print("\n".join(_lines(graphs, show_diff=args.diff)))
    if args.strict and not any(graph["sites"] for graph in graphs):
        print("lipass inspect: no attention site was found in any graph", file=sys.stderr)
        return NOTHING_MATCHED
    return OK


def inspect(
    model: Callable, calls: list, options: dict[str, Any], dynamic: bool | None = None
) -> list[dict]:
    """Run the passes on every graph that Dynamo makes of `calls`; the model itself runs as it is.

    Returns one JSON-able dict per graph: `nodes`, `sites`, `passes` with their notes and diffs.

    Raises:
        UsageError: for a preset or option that does not exist.
        PassError: when a pass fails.
    """
    import torch

    import lipass.unit  # noqa: F401 (registers the ops that passes insert)
    from lipass.backend import pipeline_of
    from lipass.config import Config
    from lipass.passes.core import PassPipeline

    try:
        config = Config.resolve(None, options)
        # `off` goes to the inner compiler without any pass, not even those that only look.
        looks = config.preset != "off" or config.pipeline is not None
        pipeline = pipeline_of(config) if looks else PassPipeline()
    except ValueError as error:
        raise UsageError(str(error)) from error
    graphs: list[dict] = []

    def record(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
        graphs.append(_inspect_graph(gm, pipeline))
        return gm.forward

    compiled = torch.compile(model, backend=record, dynamic=dynamic)
    try:
        with torch.no_grad():
            for call in calls:
                if isinstance(call, dict):
                    compiled(**call)
                else:
                    compiled(*call)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from error
    return graphs


def _inspect_graph(gm: Any, pipeline: Any) -> dict:
    """Run the passes on a copy, so that the original can still run."""
    import torch

    from lipass.passes import PIPELINES
    from lipass.passes.core import PassContext, PassPipeline
    from lipass.passes.runner import run_pipeline
    from lipass.passes.site import sites

    facts = _copy(torch, gm)
    run_pipeline(PassPipeline.parse(PIPELINES["exact"]), facts, PassContext.of(facts.graph))
    rewritten = _copy(torch, gm)
    records = run_pipeline(pipeline, rewritten, PassContext.of(rewritten.graph), diff=True)
    return {
        "nodes": len(gm.graph.nodes),
        "sites": [_site(site) for _, site in sites(facts.graph)],
        "passes": [
            {
                "name": record.name,
                "numerics": record.numerics,
                "changed": record.changed,
                "seconds": record.seconds,
                "notes": [
                    {"site": note.site, "action": note.action, "reason": note.reason}
                    for note in record.notes
                ],
                "diff": record.diff,
            }
            for record in records
        ],
    }


def _copy(torch: Any, gm: Any) -> Any:
    """Copy the graph and share the weights; copying them would double a large model."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return torch.fx.GraphModule(gm, graph)


def _site(site: Any) -> dict:
    keys = [
        {"role": segment.role, "grid": _grid(segment.grid), "why": segment.why}
        for segment in site.segments
    ]
    return {
        "name": site.name,
        "where": site.where,
        "role": site.role,
        "q_grid": _grid(site.q_grid) if site.q_grid else None,
        "keys": keys,
        "reason": site.reason,
    }


def _grid(grid: tuple) -> str:
    return "x".join(str(size) for size in grid)


def _option(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found:
        raise UsageError(f"an option must be KEY=VALUE, got {text!r}; try -o sparse.tile=4,4,4")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def _load(target: str) -> tuple[Callable, list]:
    """Import the target and call it."""
    where, found, name = target.rpartition(":")
    if not found or not where or not name:
        raise UsageError(
            f"TARGET must be module:callable or file.py:callable, got {target!r}; "
            "try examples/attention.py:build"
        )
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    build = getattr(module, name, None)
    if not callable(build):
        raise UsageError(f"{where} must define the callable {name!r}, and does not; see --help")
    made = build()
    if not (
        isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], tuple | dict | list)
    ):
        raise UsageError(
            f"{target} must return (model, inputs), got {type(made).__name__}; inputs is a tuple, "
            "a dict, or a list of those"
        )
    model, inputs = made
    return model, inputs if isinstance(inputs, list) else [inputs]


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"the file of TARGET must exist, got {str(path)!r}; check the path")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"the file of TARGET must be Python, got {str(path)!r}; check the name")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"the module of TARGET must be importable, got {error}") from error


def _lines(graphs: list[dict], show_diff: bool) -> Iterator[str]:
    for index, graph in enumerate(graphs):
        sites = graph["sites"]
        yield f"graph {index}: {graph['nodes']} nodes, {len(sites)} attention sites"
        for site in sites:
            keys = " | ".join(f"{part['role']} {part['grid']}" for part in site["keys"])
            yield (
                f"  {site['name']}  {site['where']}  {site['role']}  "
                f"q {site['q_grid'] or '?'}  keys {keys or '?'}"
            )
        for one in graph["passes"]:
            verdict = "changed" if one["changed"] else "unchanged"
            yield f"  {one['name']} ({one['numerics']}): {verdict}, {one['seconds'] * 1e3:.0f} ms"
            yield from _notes(one["notes"])
            if show_diff:
                yield from (f"    {line}" for line in one["diff"].splitlines())
    if not graphs:
        yield "no graph: Dynamo compiled nothing of the target"


def _notes(notes: list[dict]) -> Iterator[str]:
    """Print notes that say the same of many sites, as equal layers have, once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for note in notes:
        groups.setdefault((note["action"], note["reason"]), []).append(note["site"])
    for (action, reason), sites in groups.items():
        where = sites[0] if len(sites) == 1 else f"{sites[0]} .. {sites[-1]} ({len(sites)})"
        yield f"    {action:<9} {where}: {reason}"
