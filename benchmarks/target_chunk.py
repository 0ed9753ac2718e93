"""Hold a frame rate while others work on the machine, and print what came of it.

    python -m benchmarks.target_chunk [--target-ms 200] [--burners 2] [--threads 1]

TinyWorld turns to and fro in the free regime for 64 chunks behind 4 that are not counted. In the
second and in the last quarter of them other processes compute as fast as they can. Without a
target, it is 3 times what the fastest point takes on the idle machine. Each row is a process of
its own: with one thread, and with all of them, which wait for each other asleep or, as OpenMP has
it by default, spinning.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import lipass
from benchmarks.environment import environment
from lipass.examples.tinyworld.camera import STEP_DEG
from lipass.examples.tinyworld.compare import CALIBRATED, Contender
from lipass.examples.tinyworld.model import CHUNK_LATENTS, tokenize
from lipass.examples.tinyworld.rollout import roll_out
from lipass.examples.tinyworld.scenario import make_scenario
from lipass.examples.tinyworld.weights import load
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt_points import percentile

WARM_CHUNKS, CHUNKS = 4, 64
# Room for others on the machine: what takes twice as long is still early enough.
_ROOM = 3.0
# Threads that spin hold a core while the one that they wait for has none. OpenMP reads it once.
_WAITS = "OMP_WAIT_POLICY"


class Burners:
    """Processes that take time from the one that is measured."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._running: list[subprocess.Popen[bytes]] = []

    def on(self, wanted: bool) -> None:
        """Start or end them."""
        if wanted and not self._running:
            command = [sys.executable, "-c", "while True: pass"]
            self._running = [subprocess.Popen(command) for _ in range(self._count)]
        elif not wanted:
            for one in self._running:
                one.terminate()
                one.wait()
            self._running = []


@contextlib.contextmanager
def burners(count: int) -> Iterator[Burners]:
    """End them whatever happens."""
    own = Burners(count)
    try:
        yield own
    finally:
        own.on(False)


def busy(chunk: int, chunks: int = CHUNKS) -> bool:
    """Whether others work, by the number of the chunk among those that are counted."""
    return chunk >= 0 and chunk // max(chunks // 4, 1) % 2 == 1


@torch.no_grad()
def measure(
    frontier: Path, target_ms: float | None, inner: str, count: int, chunks: int = CHUNKS
) -> dict[str, Any]:
    """Roll out once at the fastest point on the idle machine, then with the target."""
    found = lipass.Frontier.load(frontier)
    model, codec = load()
    scene = make_scenario("left/right", "free", 9001, codec)
    total = WARM_CHUNKS + chunks + 1
    turns = ", ".join(["left-32, right-32"] * (total * CHUNK_LATENTS // 64 + 1))
    w2c = parse_trajectory(turns, step_deg=STEP_DEG)[: total * CHUNK_LATENTS]
    text = model.text(tokenize("a room at day in clear air in plain light")[None])
    own = Contender("all", model, inner, {**found.options_of(), "inner": inner})

    def walk(session: lipass.Session, cameras: Any, begins: Any = None) -> list[Any]:
        with session:
            roll_out(own, text, scene.given, cameras, seed=9001, session=session, progress=begins)
        return [one for one in lipass.report().chunks if one.session == session.number]

    fastest = found.points[-1]
    quick = {**found.options_of(fastest.name), "inner": inner}
    for _ in range(2):  # the first one compiles
        idle = walk(lipass.Session(**quick), w2c[: 12 * CHUNK_LATENTS])
    idle_ms = statistics.median(one.seconds * 1e3 for one in idle if not one.compiled)
    target_ms = target_ms or round(_ROOM * idle_ms, 1)
    with burners(count) as others:
        session = lipass.Session(frontier=found, target_chunk_ms=target_ms, inner=inner)

        def begins(start: int) -> None:
            others.on(busy(start // CHUNK_LATENTS - WARM_CHUNKS, chunks))

        records = walk(session, w2c, begins)[WARM_CHUNKS:]
    times = [one.seconds * 1e3 for one in records]
    quarters = [times[n : n + len(times) // 4] for n in range(0, len(times), len(times) // 4)]
    p95 = percentile(sorted(times), 0.95)
    return {
        "target_ms": target_ms,
        "p95_ms": round(p95, 1),
        "p95_over_target": round(p95 / target_ms, 3),
        "holds": p95 <= 1.1 * target_ms,
        "p50_ms": round(statistics.median(times), 1),
        "chunks": len(times),
        "late": sum(one > 1.1 * target_ms for one in times),
        "quarters_p50_ms": [round(statistics.median(own), 1) for own in quarters],
        "points": dict(Counter(one.plan.point for one in records)),
        "points_by_chunk": [one.plan.point for one in records],
        "ms_by_chunk": [round(one, 1) for one in times],
        "compiled_in": sum(one.compiled for one in records),
        "fastest_idle_ms": round(idle_ms, 1),
        "burners": count,
        "threads": torch.get_num_threads(),
        "waits": os.environ.get(_WAITS, "as OpenMP has it"),
        **environment(),
    }


def rows(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Measure with one thread and with all, in processes of their own."""
    found = []
    for threads, waits in ((1, None), (os.cpu_count(), "passive"), (os.cpu_count(), None)):
        given = {name: value for name, value in os.environ.items() if name != _WAITS}
        command = [sys.executable, "-m", "benchmarks.target_chunk", *arguments]
        made = subprocess.run(
            [*command, "--threads", str(threads)],
            env=given if waits is None else given | {_WAITS: waits},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        found.append(json.loads(made.stdout))
    return found


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frontier", type=Path, default=CALIBRATED)
    parser.add_argument("--target-ms", type=float)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--burners", type=int, default=os.cpu_count())
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--threads", type=int, help="one row, with so many")
    args = parser.parse_args()
    if not args.threads:
        print(json.dumps({"rows": rows(sys.argv[1:]), **environment()}, indent=1))
        return
    torch.set_num_threads(args.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lipass.LipassWarning)  # of another device than calibrated
        found = measure(args.frontier, args.target_ms, args.inner, args.burners, args.chunks)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
