"""Compile a model ahead and fill torch's caches, so that the first tick of a server is fast.

Later processes find the graphs where model, sizes, options, threads and versions are the same, and
TORCHINDUCTOR_CACHE_DIR too; that folder can go into an image. They still trace the model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lipass.cli import FAILURE, OK, UsageError, target
from lipass.cli.failures import raised
from lipass.cli.importing import import_callable
from lipass.cli.terminal import columns
from lipass.cli.toolchain import check_compiler
from lipass.errors import LipassError

SUMMARY = "compile a model ahead, so that the first call of a later process is fast"
SCHEMA_VERSION = 1

_MAIN = "import sys; from lipass.cli import main; sys.exit(main(sys.argv[1:]))"
_COMPILED = "_compile.compile_inner"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass warmup`."""
    target.add_arguments(parser, presets=True)
    parser.add_argument(
        "--run",
        dest="by_itself",
        action="store_true",
        help="TARGET compiles and runs by itself, such as one chunk of your server; it is called "
        "without arguments, and presets and options are its own",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads, as your process will set them"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="presets compiled side by side (default: cores)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Compile each preset, in processes side by side where there are several."""
    presets = args.preset or ["all"]
    for name in ("threads", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}; try 2")
    if args.by_itself and (args.preset or args.option or args.add or args.dynamic):
        raise UsageError(
            "--run takes no --preset, -o, --add or --dynamic: TARGET compiles by itself"
        )
    if args.by_itself or len(presets) == 1:
        rows = [_one(args, presets[0])]
    else:
        rows = _side_by_side(args, presets)
    if args.json:
        print(json.dumps({"schema_version": SCHEMA_VERSION, "rows": rows}))
    else:
        print("\n".join(_table(rows)))
    return FAILURE if any("error" in row for row in rows) else OK


def _one(args: argparse.Namespace, preset: str) -> dict[str, Any]:
    """Compile in this process."""
    import torch
    from torch._dynamo.utils import compilation_time_metrics, counters

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    begin = time.perf_counter()
    calls = _calls(args, preset)
    built_s = time.perf_counter() - begin
    compilation_time_metrics.clear()
    counters.clear()
    label = args.target if args.by_itself else preset
    rows: list[dict[str, float]] = []
    with torch.no_grad():
        for number, call in enumerate(calls, 1):
            known = len(compilation_time_metrics.get(_COMPILED, ()))
            begin = time.perf_counter()
            try:
                with contextlib.redirect_stdout(sys.stderr):  # ours is for the table or the JSON
                    call()
            except (Exception, SystemExit) as error:
                cause = getattr(error, "inner_exception", error)
                if isinstance(cause, LipassError):
                    raise cause from error
                raise LipassError(f"{args.target} must run, and {raised(error)}") from error
            seconds = time.perf_counter() - begin
            graphs = [round(s, 2) for s in compilation_time_metrics.get(_COMPILED, ())[known:]]
            rows.append({"seconds": round(seconds, 2), "graphs": graphs})  # type: ignore[dict-item]
            each = ", ".join(f"{one:.1f} s" for one in graphs)
            print(
                f"warmup {label}: call {number}/{len(calls)} took {seconds:.1f} s, "
                f"{len(graphs)} graphs{f' ({each})' if each else ''}",
                file=sys.stderr,
                flush=True,
            )
    return {
        "preset": label,
        "built_s": round(built_s, 2),
        "seconds": round(sum(row["seconds"] for row in rows), 2),
        "calls": rows,
        "compiled": counters["inductor"]["fxgraph_cache_miss"],
        "cached": counters["inductor"]["fxgraph_cache_hit"],
    }


def _calls(args: argparse.Namespace, preset: str) -> list[Callable[[], Any]]:
    """List what to call; every call of a target may be of another size."""
    import torch

    if args.by_itself:
        return [import_callable(args.target)]
    from lipass.cli.tracing import pipeline_for
    from lipass.config import Config

    options = target.options_of(args, preset)
    pipeline = pipeline_for(options, args.add)
    check_compiler(Config.resolve(None, options).inner, "-o inner=aot_eager")
    if args.add:
        options["pipeline"] = str(pipeline)
    loaded = target.load(args.target)
    compiled = torch.compile(
        loaded.model, backend="light_interaction", options=options, dynamic=args.dynamic or None
    )
    return [
        lambda index=index: loaded.call(compiled, index)  # type: ignore[misc]
        for index in range(len(loaded.calls))
    ]


def _side_by_side(args: argparse.Namespace, presets: list[str]) -> list[dict[str, Any]]:
    """Compile each preset in a process of its own; what one has compiled, the others find."""
    given = ["warmup", args.target, "--json"]
    given += [text for option in args.option for text in ("-o", option)]
    given += [text for name in args.add for text in ("--add", name)]
    given += ["--dynamic"] if args.dynamic else []
    given += ["--threads", str(args.threads)] if args.threads else []

    def work(preset: str) -> dict[str, Any]:
        command = [sys.executable, "-c", _MAIN, *given, "--preset", preset]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != OK:
            return {"preset": preset, "error": f"exit code {done.returncode}, see above"}
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["rows"][0]
        return row

    with ThreadPoolExecutor(args.jobs or os.cpu_count() or 1) as pool:
        return list(pool.map(work, presets))


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [("preset", "calls", "graphs", "seconds", "compiled", "from caches")]
    for row in rows:
        if "error" in row:
            lines.append((row["preset"], row["error"], "", "", "", ""))
            continue
        graphs = sum(len(call["graphs"]) for call in row["calls"])
        numbers = (len(row["calls"]), graphs, row["seconds"], row["compiled"], row["cached"])
        lines.append((row["preset"], *map(str, numbers)))
    return columns(lines)
