"""The tables of docs/calibrate.md: what a calibration found, and what held a frame rate."""

from pathlib import Path
from typing import Any

from lipass import Frontier

_WAITING = {"passive": "asleep", "as OpenMP has it": "spinning, as OpenMP has it"}


def points(path: Path) -> str:
    """List the points of a frontier, the best quality first.

    Args:
        path: what `lipass calibrate` wrote.
    """
    found = Frontier.load(path)
    lines = [
        "| point | ms a chunk | speed | dB to dense, mean | worst walk | latents | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found.points:
        name = f"**{one.name}**" if one.name == found.default else one.name
        cells = (
            name, f"{one.chunk_ms:.0f}", f"{one.speedup:.2f}x", f"{one.db:.1f}",
            f"{one.db_worst:.1f}", f"{one.latents:.1f}", f"{one.steps:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    device = found.environment["device"]
    lines += ["", f"A dense chunk takes {found.dense_ms:.0f} ms there ({device})."]
    return "\n".join(lines)


def kept(rows: list[dict[str, Any]]) -> str:
    """Say of each way to wait for threads what 95 % of the chunks took.

    Args:
        rows: of `python -m benchmarks.target_chunk`.
    """
    lines = [
        "| threads | waiting | target, ms | 95 % of chunks, ms | of the target | late by 10 % |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        waits = "" if row["threads"] == 1 else _WAITING[row["waits"]]
        cells = (
            str(row["threads"]), waits, f"{row['target_ms']:.0f}", f"{row['p95_ms']:.0f}",
            f"{row['p95_over_target']:.2f}", f"{row['late']} of {row['chunks']}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
