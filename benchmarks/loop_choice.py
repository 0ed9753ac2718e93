"""Compare options of the session with loops that save as much, on rooms TinyWorld was trained on.

    python -m benchmarks.loop_choice [--rooms 500 501] [--json]

Options of `compare.py` and noise levels of `rivals.py` stand or fall with it. Nothing is compiled
or timed: a row has what it reads and computes, and how far it is from the dense loop, as means
over three paths and the rooms, by regime. Tables of results are of other rooms.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lipass
from lipass.examples.tinyworld.camera import FOV_DEG
from lipass.examples.tinyworld.metrics import psnr_db
from lipass.examples.tinyworld.model import CHUNK_LATENTS, tokenize
from lipass.examples.tinyworld.residual_gates import GatedWorld
from lipass.examples.tinyworld.rivals import TWO_SIGMAS, retrieve_random
from lipass.examples.tinyworld.rollout import SIGMAS, retrieve, roll_out
from lipass.examples.tinyworld.scenario import PATHS, REGIMES, make_scenario
from lipass.examples.tinyworld.train_batches import prompt_of
from lipass.examples.tinyworld.weights import load

_VIEW = {"hfov_deg": FOV_DEG, "vfov_deg": FOV_DEG, "context.window_chunks_max": 1}


class Way(NamedTuple):
    """Noise levels, and a choice of context: by the loop, or by a session of these options.

    `gate` is the rule and threshold of a `GatedWorld`.
    """

    sigmas: tuple[float, ...] = SIGMAS
    retriever: Callable[[Tensor, Tensor], list[int]] = retrieve
    options: dict[str, Any] | None = None
    gate: tuple[str, float] | None = None


def _session(sink: int, memory: int, steps: float | None = 0.0, window: int | None = None) -> Way:
    options = {"preset": "context", **_VIEW, "context.sink_latents": sink}
    options["context.window_latents"] = window
    options["context.memory_latents"] = memory
    if steps is not None:
        options |= {"steps": True, "steps.overlap_min": steps}
    return Way(options=options)


def _cut(context: int) -> Callable[[Tensor, Tensor], list[int]]:
    return partial(retrieve, context=context, window=CHUNK_LATENTS)


WAYS = {
    "dense": Way(),
    **{f"2 steps, {one}": Way((1.0, one, 0.0)) for one in SIGMAS[1:-1]},
    **{f"2 steps, {n} latents": Way(TWO_SIGMAS, _cut(n)) for n in (8, 12, 16)},
    **{f"teacache, {one}": Way(gate=("teacache", one)) for one in (0.1, 0.2, 0.3, 0.5)},
    **{f"first block, {one}": Way(gate=("first block", one)) for one in (0.1, 0.2, 0.4, 0.6)},
    "2 steps, 8 random": Way(TWO_SIGMAS, partial(retrieve_random, context=8)),
    "session, no sink, memory 3, steps on revisits": _session(0, 3, 0.65),
    **{f"session, sink {n}, memory 3": _session(n, 3) for n in (0, 1, 2, 3, 4)},
    **{f"session, sink 4, memory {n}": _session(4, n) for n in (1, 2)},
    "session, sink 2, memory 3, window 2": _session(2, 3, window=2),
    **{
        f"session, sink 1, memory {n}, window {w}": _session(1, n, window=w)
        for n, w in ((3, 1), (3, 2), (3, 3), (4, 2))
    },
}


@torch.no_grad()
def rows(rooms: list[int], ways: list[str]) -> list[dict[str, Any]]:
    """Roll out ways through all scenes, `dense` first."""
    model, codec = load()
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for regime in REGIMES:
        for room in rooms:
            for path in PATHS:
                scene = make_scenario(path, regime, room, codec)
                text = model.text(tokenize(prompt_of(scene.attributes))[None])
                given, dense = len(scene.given), None
                for name in ways:
                    way = WAYS[name]
                    session = lipass.Session(**way.options) if way.options else None
                    gate = GatedWorld(model, *way.gate) if way.gate else None
                    made = roll_out(
                        gate or model, text, scene.given, scene.w2c, scene.walls, seed=room,
                        session=session, retriever=way.retriever, sigmas=way.sigmas,
                    )  # fmt: skip
                    shown = codec.decode(made.latents)[given:]
                    dense = shown if dense is None else dense
                    read = statistics.mean(len(chunk.context) for chunk in made.chunks)
                    steps = statistics.mean(chunk.steps_computed for chunk in made.chunks)
                    if gate is not None:
                        steps *= gate.computed / gate.calls
                    db = psnr_db(shown, dense), psnr_db(shown, scene.truth[given:])
                    found.setdefault((regime, name), []).append((*db, read, steps))
    return [_row(*key, figures) for key, figures in found.items()]


def _row(regime: str, name: str, figures: list[tuple[float, ...]]) -> dict[str, Any]:
    to_dense, to_truth, read, steps = zip(*figures, strict=True)
    return {
        "regime": regime,
        "way": name,
        "latents_read": round(statistics.mean(read), 1),
        "steps": round(statistics.mean(steps), 2),
        "db_to_dense": round(statistics.mean(to_dense), 1),
        "db_to_dense_worst": round(min(to_dense), 1),
        "db_to_renderer": round(statistics.mean(to_truth), 2),
    }


def main() -> None:
    """Print a row a regime and way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", type=int, nargs="+", default=[500, 501])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = rows(args.rooms, ["dense", *(one for one in args.ways if one != "dense")])
    if args.json:
        print(json.dumps({"rooms": args.rooms, "rows": found}, indent=1))
        return
    for row in found:
        print("  ".join(f"{value}" for value in row.values()))


if __name__ == "__main__":
    main()
