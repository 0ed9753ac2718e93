"""The page of failures is what was recorded, and the worst stays above a bound."""

import json
from dataclasses import replace

import pytest
import torch

import lipass
from benchmarks import failures
from lipass.examples.tinyworld.compare import options_of
from lipass.examples.tinyworld.hard_scenes import scene_of
from lipass.examples.tinyworld.model import CHUNK_LATENTS, tokenize
from lipass.examples.tinyworld.rollout import roll_out
from lipass.examples.tinyworld.train_batches import prompt_of
from lipass.examples.tinyworld.weights import load
from lipass.quality import psnr_db

# What is recorded may be met by another choice of the same policies, not by a worse one.
MARGIN_DB = 3.0


@pytest.fixture(scope="module")
def recorded():
    return json.loads(failures.RECORDED.read_text())


def test_page_is_what_was_recorded(recorded):
    assert failures.PAGE.read_text() == failures.page(recorded), (
        "run python -m benchmarks.failures --page-only"
    )


def test_every_preset_shows_its_worst_and_all_every_hard_walk(recorded):
    shown = {(row["preset"], row["trajectory"]) for row in recorded["shown"]}
    assert {preset for preset, _ in shown} == set(failures.PRESETS)
    assert {("all", name) for name in failures.HARD} <= shown


def test_pictures_are_there_and_small(recorded):
    paths = [failures.ROOT / "docs" / failures.picture_of(row) for row in recorded["shown"]]
    assert sorted(paths) == sorted(failures.PICTURES.iterdir())
    assert sum(path.stat().st_size for path in paths) < 400_000


@torch.no_grad()
def test_worst_recorded_walk_of_all_stays_above_its_bound(recorded):
    """One chunk of it, with the true pictures as its history, and nothing compiled."""
    rows = [one for one in recorded["shown"] if one["preset"] == "all"]
    row = min(
        (one for one in rows if one["regime"] == "explored"),
        key=lambda one: one["values"]["psnr_vs_off_worst_db"],
    )
    model, codec = load()
    whole = scene_of(row["trajectory"], row["regime"], row["room"], codec)
    start = row["chunk_start"]
    w2c = whole.w2c[: start + CHUNK_LATENTS]
    given = codec.encode(whole.truth[:start])
    scene = replace(whole, w2c=w2c, given=given, walls=whole.walls[: len(w2c)])
    text = model.text(tokenize(prompt_of(scene.attributes))[None])

    def chunk(session):
        made = roll_out(
            model, text, given, w2c, scene.walls, seed=scene.room.seed, session=session
        )
        return codec.decode(made.latents[start:])

    with lipass.Session(**options_of("all", "eager")) as session:
        found = psnr_db(chunk(session), chunk(None))
    assert found >= row["values"]["psnr_vs_off_worst_db"] - MARGIN_DB
