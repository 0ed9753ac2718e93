"""Bound the history of the streaming world in several ways, on walks of up to 256 chunks.

    python -m benchmarks.long_context --json [--chunks 16 64 256] [--rooms 9001 9002]

All methods roll out side by side, a chunk in turn, behind the same recorded half of a walk with
loops, whose way back they generate. `dense` is not rolled out over more chunks than --dense-max.
"""

import argparse
import json

import torch

from benchmarks.environment import environment
from lipass.cli.progress import progress
from lipass.examples.tinyworld.stream_compare import (
    METHODS,
    StreamContender,
    compare,
    make_walk,
    rows,
    text_of,
)
from lipass.examples.tinyworld.weights import load_stream


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
    found = []
    contenders = [StreamContender(METHODS[name], model, args.inner) for name in args.methods]
    steps = len(args.rooms) * sum(args.chunks) + len(contenders)
    with progress("long context", steps) as advance:
        first = make_walk(args.rooms[0], 16, codec)
        for contender in contenders:
            contender.warm_up(first, text)
            advance(f"compiled {contender.method.name}")
        for chunks in args.chunks:
            for room in args.rooms:
                walk = make_walk(room, chunks, codec)
                some = [
                    one for one in contenders
                    if one.method.limit_chunks or chunks <= args.dense_max
                ]  # fmt: skip
                new = rows(compare(some, walk, text, advance), codec)
                found += new
                if not args.json:
                    for row in new:
                        print(json.dumps(row), flush=True)
    if args.json:
        print(json.dumps({"environment": environment(), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
