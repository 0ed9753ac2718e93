"""Measure what stages side by side give: chunks in a second of two processes against one.

    python -m benchmarks.stages --json

A thread for each stage, as it would have a device; and, as a machine of two cores could do that
too, one process with both threads. Cases: TinyWorld's denoising and decoding as they are; the same
with a decoder that works as often as it takes to have the share of Wan's (276 of 976 ms); products
of that share; and stages that only sleep, which overlap however busy the machine is.
"""

import argparse
import functools
import json
import math
import statistics
import time

import torch

from lipass import Stage, Stages
from lipass.examples.tinyworld.scenario import camera_path
from lipass.examples.tinyworld.stages import Decoder, Denoiser
from lipass.examples.tinyworld.world import make_room

SHARE = 276 / 976
ROOM = 9001


class Work:
    """Multiply, or sleep, for so long; what is handed over has the size of a chunk of latents."""

    def __init__(self, products: int = 0, sleep_s: float = 0.0) -> None:
        self.products, self.sleep_s = products, sleep_s
        self.matrix = torch.eye(256)

    def __call__(self, item: torch.Tensor) -> torch.Tensor:
        """Take the time, and hand on what was given."""
        x = self.matrix
        for _ in range(self.products):
            x = x @ self.matrix
        time.sleep(self.sleep_s)
        return item + x[0, 0]


class SlowDecoder(Decoder):
    """The decoder, again and again."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode `times` times."""
        for _ in range(self.times):
            frames = super().__call__(latents)
        return frames


def _stage(name: str, kind: type, **options: object) -> Stage:
    # Not by the class itself: as a script this module is called __main__.
    module = "benchmarks.stages" if kind in (Work, SlowDecoder) else kind.__module__
    return Stage(name, f"{module}:{kind.__name__}", options, threads=1)


def seconds_a_chunk(stages: Stages, items: list[torch.Tensor], warm: int) -> float:
    """Median time between two results, behind the first ones."""
    ends = []
    for _ in stages.run(items):
        ends.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(ends[warm:], ends[warm + 1 :], strict=False))


def one_thread_each(line: list[Stage], items: list[torch.Tensor], warm: int) -> list[float]:
    """Median seconds of each stage alone, in turn."""
    made = [stage.made() for stage in line]
    times: list[list[float]] = [[] for _ in line]
    with torch.no_grad():
        for item in items:
            for computes, own in zip(made, times, strict=True):
                begin = time.perf_counter()
                item = computes(item)
                own.append(time.perf_counter() - begin)
    return [statistics.median(own[warm:]) for own in times]


def measure(line: list[Stage], items: list[torch.Tensor], warm: int) -> dict[str, float]:
    """Compare one process and two."""
    torch.set_num_threads(1)
    alone = one_thread_each(line, items, warm)
    with Stages(line) as here:
        one = seconds_a_chunk(here, items, warm)
    torch.set_num_threads(2)
    with Stages(line) as here:
        both = seconds_a_chunk(here, items, warm)
    torch.set_num_threads(1)
    with Stages(line, apart=True) as apart:
        two = seconds_a_chunk(apart, items, warm)
    return {
        "denoise_ms": 1e3 * alone[0],
        "decode_ms": 1e3 * alone[1],
        "decode_share": alone[1] / sum(alone),
        "one_process_ms": 1e3 * one,
        "one_process_two_threads_ms": 1e3 * both,
        "two_processes_ms": 1e3 * two,
        "gain": one / two,
        "gain_at_most": sum(alone) / max(alone),
        "hand_over_ms": 1e3 * (two - max(alone)),
    }


def _cameras(chunks: int) -> list[torch.Tensor]:
    w2c, recorded = camera_path("left/right", "explored", make_room(ROOM))
    back = w2c[:recorded].flip(0)
    return [back[4 * n % len(back) :][:4] for n in range(chunks)]


def _of_tinyworld(decoder: Stage, inner: str) -> list[Stage]:
    denoise = _stage("denoise", Denoiser, room=ROOM, inner=inner)
    return [denoise, decoder]


def _times_for(share: float, times_s: list[float]) -> int:
    """How often a decoder has to work to take at least a share of the time."""
    return max(math.ceil(share / (1 - share) * times_s[0] / times_s[1]), 1)


def main() -> None:
    """Print the figures, as text or as one JSON document."""
    parser = argparse.ArgumentParser(description="stages side by side against one process")
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--inner", default="inductor", help="inner compiler of TinyWorld")
    parser.add_argument("--only", nargs="*", help="cases, such as: sleep products")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    latents = [torch.zeros(4, 16, 8, 8)] * args.chunks
    cameras = functools.cache(lambda: _cameras(args.chunks))
    warm = args.chunks // 4
    found: dict[str, object] = {}

    def run(name: str, line: list[Stage], items: list[torch.Tensor]) -> None:
        if not args.only or name in args.only:
            found[name] = measure(line, items, warm)

    long, short = 0.07, 0.07 * SHARE / (1 - SHARE)
    sleeps = [_stage("a", Work, sleep_s=long), _stage("b", Work, sleep_s=short)]
    run("sleep", sleeps, latents)
    products = [_stage("a", Work, products=120), _stage("b", Work, products=48)]
    run("products", products, latents)
    plain = _of_tinyworld(_stage("decode", Decoder), args.inner)
    run("tinyworld", plain, cameras() if _wants("tinyworld", args.only) else [])
    if _wants("tinyworld slow decoder", args.only):
        torch.set_num_threads(1)
        times = _times_for(SHARE, one_thread_each(plain, cameras(), warm))
        slow = _of_tinyworld(_stage("decode", SlowDecoder, times=times), args.inner)
        run("tinyworld slow decoder", slow, cameras())
    if args.json:
        from benchmarks.environment import environment

        print(json.dumps({**found, **environment()}, indent=1))
        return
    for name, figures in found.items():
        print(name)
        for what, value in figures.items():
            print(f"  {what:28} {value:8.2f}")


def _wants(name: str, only: list[str] | None) -> bool:
    return not only or name in only


if __name__ == "__main__":
    main()
