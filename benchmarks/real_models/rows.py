"""Add up a walk under each preset: products, memory and calls, beside those of `off`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import lipass
from lipass.options import SparseOptions

from .count import Cost, call_cost
from .families import HUNYUAN_VIDEO, HY_WORLDPLAY, SELF_FORCING, WAN_14B, Family
from .protocol import WORLDPLAY_WALKS, Planned, worldplay

PRESETS = ("off", "exact", "sparse", "all")
SELF_FORCING_CHUNKS = 7
# A latent is the unit that poses choose, so no tile reaches over two of them.
_OWN: dict[str, dict[str, object]] = {HY_WORLDPLAY.name: {"sparse.tile": (1, 8, 8)}}


def all_rows() -> list[dict[str, object]]:
    """Return one row a family, walk and preset."""
    rows = []
    for walk, text in WORLDPLAY_WALKS.items():
        planned = {
            preset: worldplay(HY_WORLDPLAY, text, _options(preset, HY_WORLDPLAY))
            for preset in (*PRESETS, "reference")
        }
        rows += _rows(HY_WORLDPLAY, walk, planned)
    streamed = [Planned(n * SELF_FORCING.chunk_latents, SELF_FORCING.steps, None)
                for n in range(SELF_FORCING_CHUNKS)]  # fmt: skip
    rows += _rows(SELF_FORCING, "81 frames", dict.fromkeys(PRESETS, streamed))
    for family in (WAN_14B, HUNYUAN_VIDEO):
        clip = [Planned(0, family.steps, None)]
        rows += _rows(family, "one clip", dict.fromkeys(PRESETS, clip))
    return rows


def own_options(family: Family) -> dict[str, object]:
    """Return the options that suit a family, beside those of a preset."""
    return _OWN.get(family.name, {})


def _options(preset: str, family: Family) -> dict[str, object]:
    """Give a preset the options of a family, but for what it has off and for the release."""
    on = lipass.Config.resolve(preset).sparse is not None and preset != "reference"
    return {"preset": preset, **(own_options(family) if on else {})}


def _rows(family: Family, walk: str, planned: dict[str, list[Planned]]) -> list[dict[str, object]]:
    found = {}
    for preset, chunks in planned.items():
        config = lipass.Config.resolve(None, _options(preset, family))
        found[preset] = _total(family, chunks, config.sparse, hoisted=preset != "off")
    return [
        _row(family, walk, preset, planned[preset], cost, found["off"])
        for preset, cost in found.items()
    ]


def _total(
    family: Family, chunks: Iterable[Planned], sparse: SparseOptions | None, *, hoisted: bool
) -> Cost:
    total = Cost()
    for chunk in chunks:
        options = None if chunk.dense_reason else sparse
        history = chunk.context_latents
        reads_cache = family.extra_calls > 0  # a history that is never encoded again
        if history and not reads_cache:
            total += call_cost(family, "prefill", history, 0, options, hoisted=hoisted)
        role = "decode" if history else "self"
        if history == 0 and family.chunk_latents < 5:
            options = None  # a first chunk reads nothing but itself
        calls = (chunk.steps + family.extra_calls) * family.passes
        new = family.chunk_latents
        total += call_cost(family, role, new, history, options, hoisted=hoisted)
        later = call_cost(family, role, new, history, options, hoisted=hoisted, first=False)
        total += later * (calls - 1)
    return total


def _row(
    family: Family, walk: str, preset: str, chunks: list[Planned], cost: Cost, off: Cost
) -> dict[str, object]:
    calls = sum(
        (chunk.steps + family.extra_calls) * family.passes
        + (chunk.context_latents > 0 and not family.extra_calls)
        for chunk in chunks
    )
    contexts = [chunk.context_latents for chunk in chunks]
    return {
        "family": family.name,
        "walk": walk,
        "preset": preset,
        "chunks": len(chunks),
        "context_latents": contexts,
        "context_latents_mean": statistics.mean(contexts),
        "steps": [chunk.steps for chunk in chunks],
        "model_calls": calls,
        "attention_tflop": cost.attention / 1e12,
        "linear_tflop": cost.linear / 1e12,
        "density": cost.attention / cost.dense_attention,
        "kv_gb_peak": family.kv_bytes(max(contexts)) / 1e9,
        "flop_ratio_to_off": off.total / cost.total,
    }
