"""Make the figures of README, docs and DESIGN again, all of them or some.

    python -m benchmarks.figures                   all, some hours on two cores
    python -m benchmarks.figures --only steering   those whose names begin so
    python -m benchmarks.figures --list            each with its command and the commit it is of

Each command runs in a process of its own, one after the other, since all of them measure time.
What it prints becomes a document under `benchmarks/results` that carries device, versions and
commit; then the tables of README and docs are written anew. `make figures` is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from benchmarks.environment import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
_LIPASS = ("-P", "-c", "import sys; from lipass.cli import main; sys.exit(main())")


class Figure(NamedTuple):
    """A command, and where its figures are shown.

    Attributes:
        command: what Python runs.
        pages: where its figures are shown.
        minutes: it takes on two cores, roughly.
        threads: it computes with.
        written: option for the file that it writes in place of printing; "itself" where it
            knows its file, and its page.
        then: what is made of its document beside the tables.
    """

    command: tuple[str, ...]
    pages: tuple[str, ...]
    minutes: int
    threads: int = 2
    written: str = ""
    then: Callable[[dict[str, Any]], None] | None = None


def _pictures_of_demo(document: dict[str, Any]) -> None:
    """Copy the moving picture and two sheets of the demo; of the free one some rows."""
    demo, docs = ROOT / "demo", ROOT / "docs"
    shutil.copy(demo / "race.gif", docs)
    with Image.open(demo / "frames-left-right-explored-9001.png") as sheet:
        _save(sheet, docs / "film.png")
    rows = [row for row in document["rows"] if row["regime"] == "free"]
    names = ["truth", "bare walls", *dict.fromkeys(row["preset"] for row in rows)]
    with Image.open(demo / "frames-left-right-free-9001.png") as sheet:
        head = sheet.height % len(names)
        line = sheet.height // len(names)
        shown = [names.index(name) for name in ("truth", "bare walls", "off", "all")]
        cut = Image.new("RGB", (sheet.width, head + line * len(shown)))
        cut.paste(sheet.crop((0, 0, sheet.width, head)), (0, 0))
        for place, row in enumerate(shown):
            top = head + line * row
            cut.paste(sheet.crop((0, top, sheet.width, top + line)), (0, head + line * place))
        _save(cut, docs / "free.png")


def _save(picture: Image.Image, path: Path) -> None:
    """Write a picture of 256 colours, half as large as one of all."""
    picture.convert("RGB").quantize(256).save(path, optimize=True)


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.{name}", *arguments)


README, RESULTS_PAGE, DESIGN = "README.md", "docs/results.md", "DESIGN.md"
FIGURES = {
    "demo": Figure(
        (*_LIPASS, "demo", "--full", "--json"), (README, RESULTS_PAGE), 20, then=_pictures_of_demo
    ),
    "long_context": Figure(_module("long_context", "--json"), (README, RESULTS_PAGE, DESIGN), 60),
    "steering": Figure(
        _module("steering", "--json"), (RESULTS_PAGE, "docs/steering.md"), 40, written="--json"
    ),
    "real_models": Figure(
        _module("real_models", "--json", "--try-calls"), (README, RESULTS_PAGE, "docs/models"), 15
    ),
    "kernels_cpu": Figure(
        _module("run", "--repeats", "7", "--json"), ("kernels/block_sparse/README.md",), 15
    ),
    "compile_time": Figure(_module("compile_time"), (RESULTS_PAGE, DESIGN), 5),
    "long_rollout": Figure(_module("long_rollout"), (RESULTS_PAGE, DESIGN), 10),
    "live_world": Figure(
        _module("live_world", "--seconds", "60", "--visitors", "1"), ("docs/play.md",), 4
    ),
    "live_curve": Figure(
        _module("live_world", "--curve", "--seconds", "30"), ("docs/play.md",), 6
    ),
    "live_soak": Figure(_module("live_world", "--soak-minutes", "30"), ("docs/play.md",), 32),
    "exact_passes": Figure(_module("exact_passes"), (DESIGN,), 10, threads=1),
    "hoist_rows": Figure(_module("hoist_rows"), (DESIGN,), 3),
    "nearest": Figure(_module("nearest", "--rollouts", "--json"), (DESIGN,), 8, threads=1),
    "merge_history": Figure(_module("merge_history"), (DESIGN,), 5),
    "kept_plans": Figure(_module("kept_plans"), (DESIGN,), 5),
    "tile_choice": Figure(_module("tile_choice"), (DESIGN,), 10),
    "base_world": Figure(
        _module(
            "base_world", "--rooms", "9001", "--paths", "left/right", "--budgets", "0.3",
            "--repeats", "2", "--json",
        ),
        (DESIGN,), 6,
    ),
    "failures": Figure(_module("failures"), ("docs/failures.md",), 25, written="itself"),
    "along": Figure(
        _module("along", "--models", "small"), ("docs/eval.md",), 10, written="itself"
    ),
    "tile_order": Figure(_module("tile_order", "--time"), (DESIGN,), 5, threads=1),
    "target_chunk": Figure(_module("target_chunk"), ("docs/calibrate.md",), 10),
    "stages": Figure(_module("stages", "--json"), ("docs/stages.md",), 10),
    "host_cost": Figure(_module("host_cost"), (DESIGN,), 1),
    "loop_choice": Figure(_module("loop_choice", "--json"), (RESULTS_PAGE, DESIGN), 20),
    "split_heads": Figure(_module("split_heads"), (DESIGN,), 10),
    "grow_resolution": Figure(
        _module("grow_resolution", "--json"), (DESIGN, "docs/grow.md"), 30, threads=1
    ),
    "imagined": Figure(
        ("-m", "lipass.examples.tinyworld.imagined", "--rooms", "4"), (DESIGN,), 15, threads=1
    ),
    "sampler_trials": Figure(_module("sampler_trials"), (DESIGN,), 20, threads=1),
    "pose_check": Figure(_module("pose_check"), ("docs/poses.md", DESIGN), 3),
    "first_run": Figure(_module("first_run"), (RESULTS_PAGE,), 10),
}  # fmt: skip
# What no command can make here, and how it is made.
BY_HAND = {
    "benchmarks/results/versions.json": "the tests that it names, with torch of those versions",
    "benchmarks/results/gpu": "make gpu-day, on a machine with a GPU",
    "docs/frontier.svg": "lipass calibrate, as docs/calibrate.md has it, with --svg; it writes "
    "examples/tinyworld/weights/calibrated.toml too",
    "docs/play.png": "a picture of the page of lipass play, with a chunk on its way",
    "docs/inspect.png": "a picture of the page that lipass inspect "
    "examples/targets.py:worldplay_size --html page.html writes",
}
PICTURES = {"docs/race.gif": "demo", "docs/film.png": "demo", "docs/free.png": "demo"}


def main(argv: list[str] | None = None) -> int:
    """Make figures; fail if one of their commands did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="figures whose names begin so")
    parser.add_argument("--list", action="store_true", help="make nothing")
    args = parser.parse_args(argv)
    chosen = {name: figure for name, figure in FIGURES.items() if name.startswith(args.only)}
    if not chosen:
        parser.error(f"--only must begin a name of a figure, got {args.only!r}; see --list")
    if args.list:
        print("\n".join(line_of(name) for name in chosen))
        return 0
    failed = []
    for name, figure in chosen.items():
        begin = time.monotonic()
        print(f"{name}, some {figure.minutes} minutes", file=sys.stderr, flush=True)
        try:
            make(name)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name} failed with {error.returncode}", file=sys.stderr, flush=True)
        else:
            print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    for module in ("benchmarks.readme", "docs.make.generated"):
        subprocess.run([sys.executable, "-m", module], check=True, cwd=ROOT)
    return int(bool(failed))


def line_of(name: str) -> str:
    """Say how a figure is made, and of which commit the recorded one is."""
    path = RESULTS / f"{name}.json"
    commit = commit_of(json.loads(path.read_text())) if path.exists() else "not recorded"
    told = FIGURES[name].command
    shown = "lipass " + " ".join(told[3:]) if told[:3] == _LIPASS else "python " + " ".join(told)
    return f"{name:16} {commit or 'no commit':13} {FIGURES[name].minutes:4d} min  {shown}"


def make(name: str) -> None:
    """Run the command of a figure and record what it says."""
    figure, path = FIGURES[name], RESULTS / f"{name}.json"
    if figure.written == "itself":
        subprocess.run([sys.executable, *figure.command], check=True, cwd=ROOT)
        return
    partial = path.with_suffix(".partial")
    command = [sys.executable, *figure.command, *([str(partial)] if figure.written else [])]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(figure.threads)},
    )  # fmt: skip
    document = document_of(partial.read_text() if figure.written else done.stdout)
    if commit_of(document) is None:
        document["environment"] = environment()
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.rename(path)
    if name == "demo":
        readme = [sys.executable, "benchmarks/readme.py", str(path)]
        subprocess.run(readme, check=True, cwd=ROOT)
    if figure.then is not None:
        figure.then(document)


def document_of(printed: str) -> dict[str, Any]:
    """Read one JSON document, rows of JSON, or keep the lines of a table."""
    try:
        document = json.loads(printed)
        return document if isinstance(document, dict) else {"rows": document}
    except json.JSONDecodeError:
        lines = [line for line in printed.splitlines() if line.strip()]
    try:
        return {"rows": [json.loads(line) for line in lines]}
    except json.JSONDecodeError:
        return {"printed": lines}


def commit_of(document: dict[str, Any]) -> str | None:
    """Say at which commit a document was measured, or else which one recorded it."""
    own = document.get("environment")
    found = own.get("commit") if isinstance(own, dict) else document.get("commit")
    return found or document.get("recorded_by")


if __name__ == "__main__":
    sys.exit(main())
