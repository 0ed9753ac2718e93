"""Run every part on the GPU of this machine, in order of what is worth knowing.

    python -m benchmarks.gpu                 nine minutes at most; make gpu-day is the same
    python -m benchmarks.gpu --only speed    parts whose names begin so
    python -m benchmarks.gpu --dry           on a CPU: tiny shapes, stand-ins for kernels
    python -m benchmarks.gpu --only train --train stream    goes on with the streaming world
    python -m benchmarks.gpu --only train --train sampler   trains a world that samples

Needs a checkout, torch and Triton; nothing is installed. Each part is a process of its own with a
limit of its own, and writes what it knows row by row, so that a hang costs that part alone.
Results go to `benchmarks/results/gpu`: a document a part, `day.json` that says which ran, weights
that were trained. `$OUT` in place of it gets these weights, `day.json` and all documents in one
archive, since few files may come back from there. What is timed later is compiled first, beside
what is checked: both keep cores busy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_FOLDERS = ("kernels", "passes", "examples")
# Kept for writing down what was found.
_SPARE_S = 10.0


class Part(NamedTuple):
    """One process: `python -m benchmarks.gpu.<module> <arguments>`."""

    name: str
    module: str
    limit_s: float
    """Of its wall clock; the last one gets what is left."""
    arguments: tuple[str, ...] = ()
    beside: bool = False
    """Whether it runs beside the part in front of it: none of them is timed."""


PARTS = (
    Part("about", "about", 45),
    # Nobody has seen these run. They are alone and first: one that hangs holds the GPU up, and
    # what came of them is kept, so that no later part tries them.
    Part("right_gluon", "right", 90, ("gluon",)),
    Part("right_fa4", "right", 60, ("fa4",)),
    Part("right_tma", "right", 100, ("tma",)),
    Part("right_triton", "right", 100, ("triton",), beside=True),
    Part("right_planning", "right", 100, ("planning",), beside=True),
    Part("right_operator", "right", 100, ("operator",), beside=True),
    Part("warm_speed", "speed", 100, ("--warm",), beside=True),
    Part("warm_worldplay", "blocks", 100, ("hy-worldplay", "--warm"), beside=True),
    Part("warm_matrix_game", "blocks", 100, ("matrix-game-3", "--warm"), beside=True),
    Part("speed", "speed", 150),
    Part("blocks_worldplay", "blocks", 80, ("hy-worldplay",)),
    Part("blocks_matrix_game", "blocks", 60, ("matrix-game-3",)),
    Part("train", "train", 1e9, ("base",)),
)


def main(argv: list[str] | None = None) -> int:
    """Run the parts and write `day.json`; fail if one of them did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=530.0, help="of all parts together")
    parser.add_argument("--only", default="", help="parts whose names begin so")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, no figure")
    parser.add_argument("--train", default="base", choices=("small", "base", "stream", "sampler"))
    parser.add_argument("--out", type=Path, help="folder of the documents")
    args = parser.parse_args(argv)
    parts = [part for part in PARTS if part.name.startswith(args.only)]
    parts = [
        part._replace(arguments=(args.train,)) if part.module == "train" else part
        for part in parts
    ]
    begin, day = time.monotonic(), {"dry": args.dry, "commit": _commit(), "parts": {}}
    with tempfile.TemporaryDirectory() as links, tempfile.TemporaryDirectory() as scratch:
        path = _importable(Path(links))
        packed = os.environ.get("OUT") if args.out is None else None
        out = Path(scratch) if packed else args.out or ROOT / "benchmarks/results/gpu"
        out.mkdir(parents=True, exist_ok=True)
        broken: list[str] = []
        for group in _groups(parts):
            left = args.seconds - _SPARE_S - (time.monotonic() - begin)
            measured = _measured()
            for part, said in _run(group, left, out, args.dry, path, broken).items():
                day["parts"][part] = said
                if part.startswith("right_") and _is_broken(said["state"]):
                    broken.append(part.removeprefix("right_"))
                print(f"{part}: {said['state']}, {said['seconds']:.0f} s", flush=True)
                if said["state"] != "done":
                    print(said["tail"], flush=True)
            if len(group) > 1:  # what was timed beside others would decide for those behind
                for kept in _measured() - measured:
                    kept.unlink(missing_ok=True)
            (out / "day.json").write_text(json.dumps(day, indent=1) + "\n")
            if packed:
                _pack(out, Path(packed))
    return int(any(said["state"] != "done" for said in day["parts"].values()))


def _run(
    group: list[Part], left: float, out: Path, dry: bool, path: str, broken: list[str]
) -> dict[str, dict]:
    """Run parts beside each other; none may take longer than it has, or than what is left."""
    said: dict[str, dict] = {}
    running = []
    for part in group:
        limit = min(part.limit_s, left)
        if limit <= 0:
            said[part.name] = {"state": "no time was left", "seconds": 0.0, "tail": ""}
            continue
        log = (out / f"{part.name}.log").open("w")
        command = [sys.executable, "-m", f"benchmarks.gpu.{part.module}", *part.arguments]
        command += ["--out", str(out / f"{part.name}.json")]
        command += ["--until", str(time.monotonic() + limit)]
        command += [f"--without={provider}" for provider in broken]
        process = subprocess.Popen(
            command + ["--dry"] * dry,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT,
            env=_environment(path),
        )  # fmt: skip
        running.append((part, process, log, time.monotonic(), limit))
    for part, process, log, start, limit in running:
        try:
            process.wait(max(limit - (time.monotonic() - start), 0.1))
            state = "done" if process.returncode == 0 else f"failed with {process.returncode}"
        except subprocess.TimeoutExpired:
            state = f"stopped after {limit:.0f} s"
        with contextlib.suppress(ProcessLookupError):  # what it started itself goes too
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold it for ever
            process.wait(10)
        log.close()
        tail = (out / f"{part.name}.log").read_text(errors="replace")[-1500:]
        said[part.name] = {"state": state, "seconds": time.monotonic() - start, "tail": tail}
    return said


def _is_broken(state: str) -> bool:
    """Whether a part hung or crashed; one that found something wrong ends with 1."""
    return state.startswith(("stopped", "failed")) and state != "failed with 1"


def _groups(parts: list[Part]) -> list[list[Part]]:
    groups: list[list[Part]] = []
    for part in parts:
        if part.beside and groups:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _importable(links: Path) -> str:
    """Let the folders of this checkout be imported as installing it would; give PYTHONPATH."""
    package = links / "lipass"
    package.mkdir()
    for path in [*(ROOT / "lipass").iterdir(), *(ROOT / name for name in _FOLDERS)]:
        (package / path.name).symlink_to(path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = links / "lipass-0.dist-info"  # torch looks for backends in what is installed
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: lipass\nVersion: 0\n")
    told = [
        f"[{group}]\n" + "".join(f"{name} = {where}\n" for name, where in points.items())
        for group, points in project["entry-points"].items()
    ]
    (installed / "entry_points.txt").write_text("\n".join(told))
    rest = [path for path in [os.environ.get("PYTHONPATH")] if path]
    return os.pathsep.join([str(links), str(ROOT), *rest])


def _environment(path: str) -> dict[str, str]:
    """Have Python look there and not in its own folder, where `lipass` is without its kernels."""
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _measured() -> set[Path]:
    """List what earlier processes have kept of the times of kernels."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lipass"
    return {*cache.glob("gpu_rates_*.json"), *cache.glob("gpu_providers_*.json")}


def _pack(parts: Path, out: Path) -> None:
    """Put the documents of the parts into one archive; `day.json` and weights beside it."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "parts.partial"  # the call may be cut
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted([*parts.glob("*.json"), *parts.glob("*.log")]):
            archive.write(path, path.name)
    partial.replace(out / "parts.zip")
    for path in [parts / "day.json", *parts.glob("*.safetensors")]:
        shutil.copy2(path, partial)
        partial.replace(out / path.name)


def _commit() -> str:
    """Name the commit; a machine that was sent a copy of the tree may have no git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return os.environ.get("COMMIT", "unknown")


if __name__ == "__main__":
    sys.exit(main())
