"""Roll out 200 chunks in one session and print what grew: graphs, memory, what outlives it.

    python -m benchmarks.long_rollout [--chunks 200] [--inner inductor]

The camera turns and comes back for as long as it takes, in the free regime: the context goes from
4 to 20 latents and the history to some 800.
"""

import argparse
import gc
import json
import weakref
from pathlib import Path

import torch

from benchmarks.environment import environment
from lipass.examples.tinyworld.camera import STEP_DEG
from lipass.examples.tinyworld.compare import Contender
from lipass.examples.tinyworld.model import CHUNK_LATENTS, tokenize
from lipass.examples.tinyworld.rollout import roll_out
from lipass.examples.tinyworld.scenario import make_scenario
from lipass.examples.tinyworld.weights import load
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import reset_report

# Counted from here on, or from the middle: every role has run, allocators have what they keep.
WARM_CHUNKS = 40


def resident_mb() -> float:
    """Return the memory of this process, in MB."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6


def measure(chunks: int, preset: str, inner: str) -> dict[str, object]:
    """Roll out once."""
    model, codec = load()
    scene = make_scenario("left/right", "free", 9001, codec)
    turns = ", ".join(["left-32, right-32"] * (chunks * CHUNK_LATENTS // 64 + 1))
    w2c = parse_trajectory(turns, step_deg=STEP_DEG)[: (chunks + 1) * CHUNK_LATENTS]
    contender = Contender(preset, model, inner)
    graphs, memory = [], []

    def note(_: int) -> None:
        graphs.append(int(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
        memory.append(resident_mb())

    with torch.no_grad():
        text = model.text(tokenize("a room at day in clear air in plain light")[None])
        session = contender.session()
        assert session is not None, "a preset with a session"
        with session:
            roll_out(contender, text, scene.given, w2c, seed=9001, session=session, progress=note)
    warm = min(WARM_CHUNKS, len(graphs) // 2)
    alive = weakref.ref(session)
    del session
    reset_report()
    gc.collect()
    return {
        "chunks": len(graphs),
        "preset": preset,
        "inner": inner,
        "graphs": graphs[-1],
        "graphs_after_warm_up": graphs[-1] - graphs[warm],
        "resident_mb_after_warm_up": memory[warm],
        "resident_mb_at_the_end": memory[-1],
        "memory_drift": memory[-1] / memory[warm] - 1,
        "session_outlives_its_block": alive() is not None,
        **environment(),
    }


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--preset", default="all")
    parser.add_argument("--inner", default="inductor")
    args = parser.parse_args()
    print(json.dumps(measure(args.chunks, args.preset, args.inner), indent=1))


if __name__ == "__main__":
    main()
