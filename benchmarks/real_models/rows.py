"""Add up a walk under each preset: products, memory and calls, beside those of `off`."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable

import lipass
from lipass.options import SparseOptions

from .count import Cost, call_cost
from .families import (
    HUNYUAN_VIDEO,
    HY_WORLDPLAY,
    LINGBOT_WORLD,
    MATRIX_GAME_3,
    SELF_FORCING,
    WAN_14B,
    Family,
)
from .protocol import MATRIX_GAME_WALKS, WORLDPLAY_WALKS, Planned, matrix_game, worldplay

PRESETS = ("off", "exact", "sparse", "all")
# What `all` costs where latents change so slowly that the window is the longest.
LONGEST = "all, longest window"
SELF_FORCING_CHUNKS = 7
# A latent is the unit that poses choose, so no tile reaches over two of them. Matrix-Game-3.0 gets
# the budget of its release.
_OWN: dict[str, dict[str, object]] = {
    HY_WORLDPLAY.name: {"sparse.tile": (1, 8, 8)},
    MATRIX_GAME_3.name: {"sparse.tile": (1, 8, 8), "sparse.budget_self": 0.2},
}


def all_rows() -> list[dict[str, object]]:
    """Return one row a family, walk and preset."""
    rows = []
    for walk, text in WORLDPLAY_WALKS.items():
        planned = {
            preset: worldplay(HY_WORLDPLAY, text, options_of(preset, HY_WORLDPLAY))
            for preset in (*PRESETS, "reference")
        }
        planned[LONGEST] = worldplay(
            HY_WORLDPLAY, text, options_of(LONGEST, HY_WORLDPLAY), changing=False
        )
        rows += _rows(HY_WORLDPLAY, walk, planned)
    for walk, text in MATRIX_GAME_WALKS.items():
        planned = {
            preset: matrix_game(MATRIX_GAME_3, text, preset)
            for preset in (*PRESETS, "reference-matrix-game")
        }
        rows += _rows(MATRIX_GAME_3, walk, planned)
    size, steps = SELF_FORCING.chunk_latents, SELF_FORCING.steps
    streamed = [Planned(n * size, steps, None, size) for n in range(SELF_FORCING_CHUNKS)]
    rows += _rows(SELF_FORCING, "81 frames", dict.fromkeys(PRESETS, streamed))
    for family in (LINGBOT_WORLD, WAN_14B, HUNYUAN_VIDEO):
        clip = [Planned(0, family.steps, None, family.chunk_latents)]
        rows += _rows(family, "one clip", dict.fromkeys(PRESETS, clip))
    return rows


def own_options(family: Family) -> dict[str, object]:
    """Return the options that suit a family, beside those of a preset."""
    return _OWN.get(family.name, {})


def options_of(preset: str, family: Family) -> dict[str, object]:
    """Give a preset the options of a family, but for what it has off and for the release."""
    preset = preset.partition(",")[0]
    on = lipass.Config.resolve(preset).sparse is not None and not preset.startswith("reference")
    return {"preset": preset, **(own_options(family) if on else {})}


def _rows(family: Family, walk: str, planned: dict[str, list[Planned]]) -> list[dict[str, object]]:
    found = {}
    for preset, chunks in planned.items():
        config = lipass.Config.resolve(None, options_of(preset, family))
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
        history, new = chunk.context_latents, chunk.new_latents
        if history and family.history == "encoded":
            total += call_cost(family, "prefill", history, 0, options, hoisted=hoisted)
        role = "decode" if history else "self"
        if family.history == "joint":
            role, history, new = "self", 0, history + new
        elif not history:
            options = None  # a first chunk reads nothing but itself
        cost = functools.partial(
            call_cost, family, role, new, history, options, hoisted=hoisted,
            rows_latents=chunk.rows_latents,
        )  # fmt: skip
        total += cost() + cost(first=False) * (_calls(family, chunk) - 1)
    return total


def _calls(family: Family, chunk: Planned) -> int:
    """Count model calls that generate."""
    return (chunk.steps + family.extra_calls) * family.passes


def _row(
    family: Family, walk: str, preset: str, chunks: list[Planned], cost: Cost, off: Cost
) -> dict[str, object]:
    encodes = family.history == "encoded"
    calls = sum(_calls(family, one) + (encodes and one.context_latents > 0) for one in chunks)
    contexts = [chunk.context_latents for chunk in chunks]
    return {
        "family": family.name,
        "walk": walk,
        "preset": preset,
        "options": {k: v for k, v in options_of(preset, family).items() if k != "preset"},
        "chunks": len(chunks),
        "context_latents": contexts,
        "context_latents_mean": statistics.mean(contexts),
        "steps": [chunk.steps for chunk in chunks],
        "model_calls": calls,
        "attention_tflop": cost.attention / 1e12,
        "linear_tflop": cost.linear / 1e12,
        "density": cost.attention / cost.dense_attention,
        "kv_gb_peak": 0 if family.history == "joint" else family.kv_bytes(max(contexts)) / 1e9,
        "flop_ratio_to_off": off.total / cost.total,
    }
