"""Count and time what hoist-rows saves on blocks of HY-WorldPlay's width, depth cut to 2.

    python -m benchmarks.hoist_rows [--blocks 2] [--repeats 3]

Plain Inductor and Inductor behind hoist-rows take turns; figures are medians.
"""

import argparse
import importlib.util
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.environment import environment
from lipass.cli.cost import flops
from lipass.testing import run_passes

TARGETS = Path(__file__).parent.parent / "examples" / "targets.py"
PIPELINE = "canonicalize,hoist-rows"


def model_and_call(blocks: int):
    """Build the target with random weights."""
    spec = importlib.util.spec_from_file_location("targets", TARGETS)
    targets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(targets)
    torch.manual_seed(0)
    model, call = targets.worldplay_size(blocks=blocks)
    return model.eval().requires_grad_(False), call


def linear_flops(graph: torch.fx.Graph) -> int:
    """Sum up the FLOPs of the linear layers of a graph."""
    linear = (n for n in graph.nodes if getattr(n.target, "__name__", "") == "linear")
    return sum(flops(node) for node in linear)


def measure(blocks: int, repeats: int) -> dict[str, object]:
    """Count on the graph, then time both."""
    model, call = model_and_call(blocks)
    counts = []
    for pipeline in ("canonicalize", PIPELINE):
        counts.append(linear_flops(run_passes(model, call, pipeline).gm.graph))
    calls = {
        "inductor": torch.compile(model),
        "hoist-rows": torch.compile(
            model, backend="light_interaction", options={"preset": "exact", "pipeline": PIPELINE}
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        outputs = [run(*call) for run in calls.values()]
        for _ in range(repeats):
            for name, run in calls.items():
                begin = time.perf_counter()
                run(*call)
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "blocks": blocks,
        "linear_tflop_before": counts[0] / 1e12,
        "linear_tflop_after": counts[1] / 1e12,
        "linear_flops_removed": 1 - counts[1] / counts[0],
        "seconds": medians,
        "speedup": medians["inductor"] / medians["hoist-rows"],
        "relative_error": float((outputs[1] - outputs[0]).norm() / outputs[0].norm()),
        **environment(),
    }


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(measure(args.blocks, args.repeats), indent=1))


if __name__ == "__main__":
    main()
