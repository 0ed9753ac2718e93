"""What DESIGN says of sorted keys and of prompts is what was recorded."""

import json
from pathlib import Path

import pytest

from benchmarks import nearest
from lipass.presets import ADAPTIVE

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "benchmarks/results/nearest.json").read_text())
DESIGN = " ".join((ROOT / "DESIGN.md").read_text().split())


def recall(key_block, query_block, share=0.2):
    (row,) = [
        row
        for row in RECORDED["recall"]
        if (row["key_block"], row["query_block"], row["share"]) == (key_block, query_block, share)
    ]
    return row["recall"]


def test_recall_is_the_recorded_one():
    found = recall(64, 32)
    told = f"64 keys to 32 queries: {found['buckets']:.2f}, tiles that span four latents"
    assert f"{told} {found['means']:.2f}, the best keys of each query" in DESIGN
    assert f"they keep {found['random planes']:.2f} where tiles keep" in DESIGN
    large = recall(128, 64)
    assert f"with blocks of 128 to 64 it is {large['buckets']:.2f} and" in DESIGN
    small = recall(64, 64)
    assert small["buckets"] == pytest.approx(small["means"], abs=0.01)


def test_default_is_what_is_faster_at_equal_recall():
    """Tiles at the share at which they keep what sorted keys keep at a fifth."""
    long = next(row for row in RECORDED["time"] if row["history_latents"] == 256)["ms"]
    low, high = (recall(64, 32, share)["means"] for share in (0.2, 0.3))
    part = (recall(64, 32)["buckets"] - low) / (high - low)
    tiles = long["means 0.2"] + part * (long["means 0.3"] - long["means 0.2"])
    buckets = long["buckets 0.2"] + long["sorting once a chunk"] / 4
    assert (ADAPTIVE["sparse"]["choose"] == "means") == (tiles < buckets)


def test_share_of_a_prompt_is_the_counted_one():
    assert nearest.text_rows() == RECORDED["text"]
    shares = [100 * row["share_of_80_words"] for row in RECORDED["text"]]
    assert f"are {min(shares):.2f} to {max(shares):.2f} % of the FLOPs" in DESIGN


def rolled(budget, choose, dense_steps=0):
    wanted = {
        "sparse.budget_decode": budget,
        "sparse.choose": choose,
        "sparse.dense_steps": dense_steps,
    }
    (row,) = [row for row in RECORDED["rollouts"] if row["options"] == wanted]
    return row


def test_pictures_are_the_recorded_ones():
    tiles, ours = rolled(0.2, "means"), rolled(0.2, "buckets")
    told = f"{ours['db_to_dense']} dB to dense at density {ours['density']:.2f}"
    assert f"{told}, tiles {tiles['db_to_dense']} dB at {tiles['density']:.2f}" in DESIGN
    few = [rolled(0.1, choose)["db_to_dense"] for choose in ("buckets", "means")]
    assert f"budget 0.1, {few[0]} and {few[1]} dB" in DESIGN
    first, more = rolled(0.2, "means", 1), rolled(0.3, "means")
    assert f"it is {first['db_to_dense']} dB to dense at density {first['density']:.2f}" in DESIGN
    assert f"without it is {more['db_to_dense']} dB at {more['density']:.2f}" in DESIGN
