"""Products of real models are those of their papers, and every approximation needs fewer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lipass
from benchmarks.real_models.attended import try_one
from benchmarks.real_models.blocks import time_block
from benchmarks.real_models.count import call_cost
from benchmarks.real_models.families import (
    HY_WORLDPLAY,
    LINGBOT_WORLD,
    MATRIX_GAME_3,
    SELF_FORCING,
)
from benchmarks.real_models.protocol import WORLDPLAY_WALKS, worldplay
from benchmarks.real_models.rows import all_rows
from lipass.config import Config

ROOT = Path(__file__).resolve().parents[2]
DENSE_SPARSE = Config.resolve("sparse", {"sparse.budget": 1.0}).sparse


# TFLOP of one block, from the shapes of the release: 929 text tokens, 1,560 a latent, two streams.
@pytest.mark.parametrize(
    ("role", "latents", "context", "attention", "linear"),
    [
        ("decode", 4, 20, 3.92, 0.995),
        ("decode", 4, 12, 2.65, 0.995),
        ("decode", 4, 8, 2.01, 0.995),
        ("prefill", 20, 0, 16.4, 4.97),
        ("prefill", 12, 0, 6.03, 2.98),
    ],
)
def test_worldplay_blocks_cost_what_their_shapes_say(role, latents, context, attention, linear):
    cost = call_cost(HY_WORLDPLAY, role, latents, context, None, hoisted=False)
    layers = HY_WORLDPLAY.layers
    assert cost.attention / layers / 1e12 == pytest.approx(attention, rel=5e-3)
    assert cost.linear / layers / 1e12 == pytest.approx(linear, rel=5e-3)


@pytest.mark.parametrize("family", [HY_WORLDPLAY, SELF_FORCING])
def test_budget_of_one_costs_what_dense_attention_costs(family):
    dense = call_cost(family, "decode", 4, 8, None, hoisted=True)
    assert call_cost(family, "decode", 4, 8, DENSE_SPARSE, hoisted=True) == dense


# Chunks 0 to 15: latents read and steps computed by the release.
def test_release_keeps_its_counts_while_turning_and_coming_back():
    planned = worldplay(HY_WORLDPLAY, WORLDPLAY_WALKS["left/right"], {"preset": "reference"})
    assert [one.context_latents for one in planned] == [0, 4, *[8] * 6, *[12] * 7, 8]
    assert [one.steps for one in planned] == [*[4] * 8, *[2] * 7, 4]


def test_release_takes_walking_forward_for_a_revisit():
    planned = worldplay(HY_WORLDPLAY, WORLDPLAY_WALKS["forward/back"], {"preset": "reference"})
    assert [one.context_latents for one in planned] == [0, 4, 8, *[12] * 13]
    assert [one.steps for one in planned] == [4, 4, 4, *[2] * 13]


# Five picks a clip behind four past latents, the sink among them; duplicates are kept.
def test_release_of_matrix_game_keeps_its_counts(rows):
    turn = rows["matrix-game-3", "left/right", "reference-matrix-game"]
    assert turn["context_latents"] == [0, 5, 5, 5, 9, 9, 9, 9]
    assert turn["steps"] == [3, 3, 3, 3, 2, 2, 2, 2]
    walk = rows["matrix-game-3", "forward/back", "reference-matrix-game"]
    assert walk["context_latents"] == [0, *[9] * 7]
    assert walk["steps"] == [3, *[2] * 7]


@pytest.fixture(scope="module")
def rows():
    return {(row["family"], row["walk"], row["preset"]): row for row in all_rows()}


def test_all_needs_fewer_products_than_the_release_where_latents_change(rows):
    released = [key for key in rows if key[2].startswith("reference")]
    assert len(released) == 4
    for key in released:
        ours, theirs = rows[(*key[:2], "all")], rows[key]
        assert ours["flop_ratio_to_off"] > theirs["flop_ratio_to_off"]
        assert ours["kv_gb_peak"] <= theirs["kv_gb_peak"]


def test_recorded_counts_are_those_that_are_counted(rows):
    recorded = json.loads((ROOT / "benchmarks/results/real_models.json").read_text())["rows"]
    assert {(row["family"], row["walk"], row["preset"]) for row in recorded} == set(rows)
    for row in recorded:
        counted = rows[row["family"], row["walk"], row["preset"]]["flop_ratio_to_off"]
        assert row["flop_ratio_to_off"] == pytest.approx(counted)


def test_longest_window_needs_more_than_the_release_and_readme_says_what(rows):
    longest = rows["hy-worldplay", "forward/back", "all, longest window"]["flop_ratio_to_off"]
    assert longest < rows["hy-worldplay", "forward/back", "reference"]["flop_ratio_to_off"]
    assert f"1/{longest:.2f} to 1/" in (ROOT / "README.md").read_text()


def test_exact_and_sparse_need_no_more_than_off_and_exact(rows):
    for (family, walk, preset), row in rows.items():
        before = {"exact": "off", "sparse": "exact", "all": "sparse"}.get(preset)
        if before:
            least = rows[family, walk, before]["flop_ratio_to_off"]
            assert row["flop_ratio_to_off"] >= least


def test_slow_content_keeps_more_attention_than_noise_does():
    options = Config.resolve("sparse", {"sparse.tile": (1, 8, 8)}).sparse
    tried = try_one(HY_WORLDPLAY, options)
    assert tried["slow"]["mass_kept"] > tried["noise"]["mass_kept"]
    assert tried["slow"]["relative_error"] < tried["noise"]["relative_error"]


def tiny(family):
    """Return a family in miniature: its structure, and two heads of 16."""
    sizes = {
        name: getattr(family, name) // family.width**2 * 32**2
        for name in ("row_weights", "kept_weights")
    }
    return replace(
        family, width=32, heads=2, head_dim=16, token_weights=13 * 32**2, text_tokens=5, **sizes
    )


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("family", "context", "steps"),
    [
        (HY_WORLDPLAY, 8, 2),
        (MATRIX_GAME_3, 8, 2),
        pytest.param(SELF_FORCING, 4, 4, marks=pytest.mark.slow),
        pytest.param(LINGBOT_WORLD, 0, 2, marks=pytest.mark.slow),
    ],
)
def test_a_chunk_through_a_block_is_timed_under_each_preset(family, context, steps):
    found = time_block(
        tiny(family), latent_grid=(4, 4), dtype=torch.float32, inner="eager", repeats=1
    )
    assert list(found["presets"]) == ["off", "exact", "sparse", "all"]
    assert all(one["ms"] > 0 for one in found["presets"].values())
    everything = found["presets"]["all"]
    assert (everything["context_latents"], everything["steps"]) == (context, steps)
    assert lipass.report().left_eager == []
