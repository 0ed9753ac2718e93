"""Show a calibration on a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lipass.calibration.density import chosen
from lipass.calibration.worth import correlation, curve

if TYPE_CHECKING:
    from lipass.calibration.calibrate import Calibration

_WIDTH = 80
_BAR = 30


def table(found: Calibration, path: str) -> str:
    """Give points, what overlap foresees and how to use them, as lines of at most 80 columns."""
    frontier = found.frontier
    device, own = frontier.environment.get("device", "an unknown device"), frontier.points
    head = (
        f"{len(found.tried)} choices on {len(frontier.walks)} walks in {found.seconds:.0f} s, "
        f"timed on {device}; a dense chunk takes {frontier.dense_ms:.1f} ms"
    )
    lines = [*textwrap.wrap(head, _WIDTH), ""]
    lines.append(f"  {'ms':>7}  {'speed':>6}  {'dB':>5}  {'worst':>5}  {'latents':>7}  "
                 f"{'steps':>5}  point")  # fmt: skip
    for one in own:
        mark = "*" if one.name == frontier.default else " "
        figures = f"{one.chunk_ms:7.1f}  {one.speedup:5.2f}x  {one.db:5.1f}  {one.db_worst:5.1f}"
        lines.append(f"{mark} {figures}  {one.latents:7.1f}  {one.steps:5.1f}")
        lines += textwrap.wrap(
            one.name, _WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 12
        )
    said = (
        "dB to the dense model, mean of all walks and worst, 60 at most; "
        f"* holds where no target is given. Two dense rollouts agree at {found.again_db:.0f} dB."
    )
    lines += ["", *textwrap.wrap(said, _WIDTH), *_attention(found), *_worth(found)]
    lines += [*_spectrum(frontier.environment), ""]
    ms = round(own[len(own) // 2].chunk_ms * 1.05)
    lines += [
        f'options = {{"frontier": "{path}"}}',
        'model = torch.compile(model, backend="light_interaction", options=options)',
        f'session = lipass.Session(frontier="{path}", target_chunk_ms={ms})',
    ]
    return "\n".join(lines)


def _spectrum(environment: Mapping[str, Any]) -> Iterator[str]:
    if "grow.spectrum" in environment:
        told = {name: tuple(environment[name]) for name in ("grow.spectrum", "grow.grid")}
        yield from ("", f"Spectrum of the latents: {told}")


def _attention(found: Calibration) -> Iterator[str]:
    if not found.densities:
        return
    taken = chosen(found.densities).label
    yield ""
    yield f"Attention where most is read; {taken} is taken:"
    for one in found.densities:
        said = f"{one.visited:4.0%} of the blocks, {one.speedup:.2f}x, {one.db:.1f} dB"
        yield f"  {one.label:16}  {said}"


def _worth(found: Calibration) -> Iterator[str]:
    rows = curve(found.worth)
    if not rows:
        return
    rank = correlation(found.worth)
    yield ""
    said = "What one latent of the history is worth, by the share of the new view that it shows"
    said += "" if rank is None else f" (rank correlation {rank:.2f})"
    yield from textwrap.wrap(f"{said}:", _WIDTH)
    most = max(max(row["db"] for row in rows), 1e-9)
    for row in rows:
        low, high = row["overlap"]
        bar = "#" * max(round(_BAR * row["db"] / most), 0)
        count = f"{low:.1f} to {high:.1f}  {row['latents']:4d}"
        yield f"  {count}  {row['db']:+6.2f} dB  {bar}".rstrip()


def plain(found: Calibration) -> dict[str, Any]:
    """Give all as plain data."""
    from lipass.calibration.worth import plain as worth

    return {
        "frontier": found.frontier.to_dict(),
        "tried": found.tried,
        "again_db": round(found.again_db, 2),
        "worth": worth(found.worth),
        "densities": [one.to_dict() for one in found.densities],
        "seconds": round(found.seconds, 1),
    }
