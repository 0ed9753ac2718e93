"""Bound the history of the streaming world in several ways, on walks of up to 256 chunks.

    python -m benchmarks.long_context --json [--chunks 16 64 256] [--rooms 9001]

All methods roll out side by side, a chunk in turn, behind the same recorded half of a walk with
loops, whose way back they generate. Over more chunks than --dense-max those that keep all of the
history are not rolled out; of `dense` a chunk is timed behind a cache of that length.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.environment import environment
from lipass.cli.progress import progress
from lipass.examples.tinyworld.model import CHUNK_LATENTS, KeyValue
from lipass.examples.tinyworld.rollout import SIGMAS
from lipass.examples.tinyworld.stream import StreamWorld
from lipass.examples.tinyworld.stream_compare import (
    DENSE,
    METHODS,
    Run,
    StreamContender,
    Walk,
    compare,
    make_walk,
    rows,
    text_of,
)
from lipass.examples.tinyworld.weights import load_stream

_REPEATS = 3


class _Masses(TorchFunctionMode):
    """Adds up, over the attention calls made inside, the weight that each history key gets."""

    def __init__(self, text_tokens: int, history: int) -> None:
        super().__init__()
        self.keys = slice(text_tokens, text_tokens + history)
        self.mass = torch.zeros(history)
        self.rest, self.calls = 0.0, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            q, k = args[:2]
            weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1).mean((0, 1, 2))
            self.mass += weights[self.keys]
            self.rest += float(weights.sum() - weights[self.keys].sum())
            self.calls += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def latent_mass(
    model: StreamWorld, dense: Run, walk: Walk, text: list[KeyValue]
) -> tuple[Tensor, float]:
    """Measure what share of attention each history latent gets in the last chunk of `dense`.

    Returns:
        The shares `[M]`, and that of prompt and own chunk; means over blocks, heads and queries of
        the second step.
    """
    last = dense.generated[-1]
    per_latent = last.latents[0, 0, 0].numel()
    history = last.start * per_latent
    cache = [(k[:, :, :history], v[:, :, :history]) for k, v in dense.cache.pairs or []]
    noise = torch.randn(last.latents.shape, generator=torch.Generator().manual_seed(0))
    level = torch.full((1, CHUNK_LATENTS), SIGMAS[1])
    noisy = (1 - SIGMAS[1]) * last.latents + SIGMAS[1] * noise
    poses = walk.w2c[None, last.start : last.start + CHUNK_LATENTS]
    with _Masses(text[0][0].shape[2], history) as seen:
        model(noisy, level, poses, text, cache)
    return seen.mass.unflatten(0, (-1, per_latent)).sum(1) / seen.calls, seen.rest / seen.calls


@torch.no_grad()
def dense_chunk_s(
    contender: StreamContender, walk: Walk, text: list[KeyValue], chunks: int
) -> float:
    """Time a chunk, four steps and a refresh, behind a cache of random keys of `chunks - 1`."""
    shape = walk.given.shape
    latents = torch.randn(1, shape[1], CHUNK_LATENTS, *shape[3:])
    heads, _, width = text[0][0].shape[1:]
    tokens = (chunks - 1) * latents[0, 0].numel()
    cache = [tuple(torch.randn(1, heads, tokens, width) for _ in pair) for pair in text]
    poses = walk.w2c[None, :CHUNK_LATENTS].contiguous()
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        for sigma in SIGMAS:  # the last one is the refresh's
            level = torch.full((1, CHUNK_LATENTS), sigma)
            contender(latents, level, poses, text, cache, None, refresh=sigma == 0.0)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _drift(run: Run) -> float:
    """Fit a line to the seconds of the generated chunks: its change from first to last."""
    seconds = torch.tensor([chunk.seconds for chunk in run.generated], dtype=torch.float64)
    place = torch.linspace(-0.5, 0.5, len(seconds), dtype=torch.float64)
    return float((place @ seconds) / (place @ place) / seconds.mean())


def _on_walk(
    model: StreamWorld, contenders: list[StreamContender], walk: Walk, text, codec, advance
) -> list[dict[str, Any]]:
    runs = compare(contenders, walk, text, advance)
    found = rows(runs, codec)
    dense = next((run for run in runs if run.contender.method.name == DENSE), None)
    if dense is not None:
        mass, rest = latent_mass(model, dense, walk, text)
    for row, run in zip(found, runs, strict=True):
        row["chunk_s_drift"] = _drift(run)
        row["recall"] = None
        if dense is not None:
            row["recall"] = rest + float(mass[run.generated[-1].context].sum())
    return found


def main() -> None:
    """Print one JSON document, or a line a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rooms", type=int, nargs="+", default=[9001])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--dense-max", type=int, default=64)
    parser.add_argument("--inner", default="inductor")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 8 * len(METHODS)
    model, codec = load_stream()
    text = text_of(model)
    found: list[dict[str, Any]] = []
    with progress(
        "long context", len(args.rooms) * sum(args.chunks) + len(args.methods)
    ) as advance:
        first = make_walk(args.rooms[0], 16, codec)
        contenders = []
        for name in args.methods:
            contenders.append(StreamContender(METHODS[name], model, args.inner))
            contenders[-1].warm_up(first, text)
            advance(f"compiled {name}")
        for chunks in args.chunks:
            some = [
                one for one in contenders if one.method.limit_chunks or chunks <= args.dense_max
            ]
            for room in args.rooms:
                walk = make_walk(room, chunks, codec)
                new = _on_walk(model, some, walk, text, codec, advance)
                found += new
                for row in new:
                    print(json.dumps(row), flush=True, file=sys.stderr if args.json else None)
            if chunks > args.dense_max and contenders[0].method.name == DENSE:
                row = {"model": "stream", "method": DENSE, "chunks": chunks}
                row["chunk_s_last"] = dense_chunk_s(contenders[0], first, text, chunks)
                found.append(row)
    if args.json:
        print(json.dumps({"environment": environment(), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
