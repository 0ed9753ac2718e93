"""Measure what a session costs the host beyond the calls of a compiled model, and its parts.

    python -m benchmarks.session_overhead --json

The model is one tiny attention compiled with `inner="eager"`, on one thread. Figures are
microseconds of processor time of this thread, medians over chunks: what other processes take is
not the session's.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict

import torch
from torch import nn
from torch.nn import functional as F

import lipass

SIGMAS = [1.0, 0.75, 0.5, 0.25, 0.0]
# Steps 0 and 3 compute, and 0 is kept for 1 and 2, which are looked up.
OPTIONS = {"preset": "cache", "inner": "eager", "steps.form": "lookup", "steps.overlap_min": 0.0}
_KEEPS, _LOOKED_UP, _COMPUTES = 0, 1, 3


class _Model(nn.Module):
    """A call with one site, small enough that the host's work is seen beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(1, -1, 3, 1, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) * sigma


class _Clock:
    """Collect microseconds by name."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = defaultdict(list)
        self._began = 0

    def start(self) -> None:
        self._began = time.thread_time_ns()

    def stop(self, name: str) -> None:
        self.samples[name].append((time.thread_time_ns() - self._began) / 1e3)


def measure(chunks: int = 150) -> dict[str, float]:
    """Return microseconds of a bare call and of what a session adds, part by part."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model = torch.compile(_Model().eval(), backend="light_interaction", options=OPTIONS)
        clock = _Clock()
        with torch.no_grad():
            _chunks(model, _Clock(), 3)
            _chunks(model, clock, chunks)
    finally:
        torch.set_num_threads(threads)
    us = {name: statistics.median(found) for name, found in clock.samples.items()}
    step, kept = us[f"step {_COMPUTES}"], us[f"step {_KEEPS}"]
    return {
        "call_us": us["bare"],
        "overhead_us": step - us["bare"] + us["next step"],
        "scope_of_session_us": us["session"] - us["bare"],
        "scope_of_chunk_us": us["chunk"] - us["session"],
        "scope_of_step_us": step - us["chunk"],
        "next_step_us": us["next step"],
        "store_us": kept - step,
        "looked_up_call_us": us[f"step {_LOOKED_UP}"],
        "plan_us_a_chunk": us["plan"],
        "receipt_us_a_chunk": us["receipt"],
    }


def _chunks(model: nn.Module, clock: _Clock, count: int) -> None:
    pose = torch.eye(4).repeat(8, 1, 1)
    sigmas = torch.tensor(SIGMAS)
    levels = list(sigmas)
    noise = torch.randn(1, 8, 16)

    def timed(name: str, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        clock.start()
        out: torch.Tensor = model(x, level)
        clock.stop(name)
        return out

    def again(name: str) -> None:
        model(noise, levels[0])  # what ran before has emptied the processor's caches
        timed(name, noise, levels[0])

    for _ in range(count):
        again("bare")
        with lipass.Session(**OPTIONS) as session:
            again("session")
            clock.start()
            chunk = session.chunk(poses=pose, query=pose[:4])
            clock.stop("plan")
            with chunk:
                again("chunk")
                x, steps = noise, iter(chunk.steps(sigmas))
                while True:
                    clock.start()
                    step = next(steps, None)
                    clock.stop("next step")
                    if step is None:
                        break
                    out = timed(f"step {step.index}", x, levels[step.index])
                    x = x + (step.sigma_next - step.sigma) * out
                clock.start()
            clock.stop("receipt")


def main() -> None:
    """Print the figures, as text or as one JSON document."""
    parser = argparse.ArgumentParser(description="what a session costs beyond a call")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    found = measure()
    if args.json:
        from benchmarks.environment import environment

        print(json.dumps({**found, **environment()}, indent=1))
        return
    for name, us in found.items():
        print(f"{name:24} {us:8.1f}")


if __name__ == "__main__":
    main()
