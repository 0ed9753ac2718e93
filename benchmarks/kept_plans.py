"""Let layers and steps follow blocks that were chosen before, on the streaming world.

    python -m benchmarks.kept_plans > benchmarks/results/kept_plans.json

Attention of all of the history is sparse; who chooses blocks differs. Figures: dB to dense over
the way back, the share of the attention mass that visited keys held (sampled), and how much of the
CPU time inside of attention went into choosing. Graphs run without Inductor.
"""

import json
import time
from typing import Any
from unittest import mock

import torch

from benchmarks.environment import environment
from lipass.examples.tinyworld.stream_compare import (
    DENSE,
    METHODS,
    Method,
    Run,
    StreamContender,
    make_walk,
    rows,
    text_of,
)
from lipass.examples.tinyworld.weights import load_stream
from lipass.kernels import registry, sparse

CHUNKS, ROOM = 16, 9001
_SPARSE = {"preset": "sparse", "sparse.dense_tokens": 0, "sparse.budget_decode": 0.3}
CHOOSERS: dict[str, dict[str, Any]] = {
    "each call": {},
    "the first step": {"sparse.plan_once": True},
    "one layer in 2": {"sparse.plan_every": 2},
    "one layer in 4": {"sparse.plan_every": 4},
    "one layer in 2 of the first step": {"sparse.plan_every": 2, "sparse.plan_once": True},
}


class _Timed:
    """A function that adds up the CPU time of its thread."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.thread_time()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.thread_time() - begin


def main() -> None:
    """Print one document."""
    torch._dynamo.config.recompile_limit = 8 * len(CHOOSERS)
    model, codec = load_stream()
    text, walk = text_of(model), make_walk(ROOM, CHUNKS, codec)
    dense = Run(StreamContender(METHODS[DENSE], model, "eager"), walk, text)
    dense.finish()
    found = []
    for name, options in CHOOSERS.items():
        contender = StreamContender(Method(name, _SPARSE | options), model, "eager")
        contender.warm_up(walk, text)
        run = Run(contender, walk, text)
        chosen, attended = _Timed(sparse._plan), _Timed(sparse.attend)
        kept = calls = 0
        mass = []
        with (
            registry.force("sparse"),
            mock.patch.object(sparse, "_plan", chosen),
            mock.patch("lipass.kernels.ops.attend", attended),
        ):
            while len(run.chunks) < CHUNKS:
                run.advance()
                for site in registry.telemetry().values():
                    kept, calls = kept + site.kept_plans, calls + site.sparse_calls
                    mass += [] if site.mass is None else [site.mass]
        run.close()
        row = rows([dense, run], codec)[1]
        found.append(
            {
                "who chooses": name,
                "db_to_dense": round(row["psnr_vs_dense_db"], 1),
                "db_to_renderer": round(row["psnr_vs_truth_db"], 1),
                "density": round(row["density"], 2),
                "calls_that_choose": round(1 - kept / calls, 2),
                "mass_held": round(sum(mass) / len(mass), 3),
                "choosing_share_of_attention": round(chosen.seconds / attended.seconds, 3),
            }
        )
    print(json.dumps({"environment": environment(), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
