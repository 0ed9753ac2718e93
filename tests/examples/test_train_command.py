"""Trainings as one command: all stages by themselves, and again after a kill in any of them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lipass.examples.tinyworld import data, train, train_models
from lipass.examples.tinyworld.camera import pixel_directions
from lipass.examples.tinyworld.catalogue import CATALOGUE_HELD_OUT_SEED, CATALOGUE_SEED
from lipass.examples.tinyworld.codec import Codec
from lipass.examples.tinyworld.learner import Learner, Pace
from lipass.examples.tinyworld.model import BASE, SMALL, ModelConfig, Rotary, TinyWorld
from lipass.examples.tinyworld.stream_walks import record_walks
from lipass.examples.tinyworld.train_batches import latent_walks
from lipass.examples.tinyworld.train_recipes import RECIPES, Sizes
from lipass.examples.tinyworld.train_rollouts import RolloutOptions
from lipass.examples.tinyworld.train_sampler import SamplerOptions
from lipass.examples.tinyworld.train_stream import StreamOptions
from lipass.examples.tinyworld.train_unseen import UnseenOptions
from lipass.examples.tinyworld.train_world import Trainer
from lipass.examples.tinyworld.weights import load

CPU = torch.device("cpu")
TINY = ModelConfig(rows=2, columns=2, width=32, heads=1, blocks=1, mlp_ratio=1, text_width=8)
SIZES = Sizes(
    1,
    UnseenOptions(contexts=1, targets=1, context=(4,), anchors=1, anchor_context=(4,)),
    RolloutOptions(lanes=1, context=(4,), anchors=1, anchor_context=(4,)),
    StreamOptions(chunks=(3,), targets=1, own_chunks=(4,), pool=4),
    SamplerOptions(contexts=1, targets=1, context=(4,), anchors=1, anchor_context=(8,)),
)


def training(model, out, seconds=3.0, init=None):
    scored = ((9001,), (2,)) if model == "stream" else ((9001,), ("explored",))
    goal = ("2 chunks", 99.0) if model == "stream" else ("explored", 1.0)
    # Long walks are always of 64 pixels.
    config = dataclasses.replace(TINY, rows=8, columns=8) if model == "stream" else TINY
    recipe = dataclasses.replace(
        RECIPES[model], config=config, pixels=16, rooms=2, on_cpu=SIZES, scored=scored, goal=goal
    )
    return train.Training(recipe, out, CPU, seconds, 1, init)


@pytest.fixture
def short(monkeypatch):
    """Paths of few latents, so that a score takes no time."""
    monkeypatch.setattr(train, "_LEAST_S", 0.1)
    monkeypatch.setattr(train, "_LEAST_FINISHING_S", 0.0)
    monkeypatch.setattr("lipass.examples.tinyworld.train_scores.PATHS", ("forward/back",))
    monkeypatch.setattr("lipass.examples.tinyworld.stream_walks.TRAIN_FRAMES", 24)
    monkeypatch.setattr("lipass.examples.tinyworld.stream_walks.LEAST_WALKS", 1)


def test_a_world_is_trained_from_nothing_and_says_how_far_it_came(tmp_path, short, capsys):
    card = training("small", tmp_path).run()
    assert list(card["stages_s"]) == list(RECIPES["small"].shares)
    assert card == json.loads((tmp_path / "small.json").read_text())
    assert set(card["steps"]) == {"world", "unseen", "rollouts"}
    assert all(steps > 0 for steps in card["steps"].values())
    assert (card["begun_with"], card["recorded"]) == (None, 2)
    assert card["held_out_db"] > 0
    assert card["reached"] == (card["db_to_the_renderer"]["explored"] >= 1.0)
    assert "goal 1: reached" in capsys.readouterr().err
    weights = load_file(tmp_path / "small.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    model, _ = load("small", tmp_path, TINY)
    average = load_file(tmp_path / "rollouts-average.safetensors")
    assert torch.equal(model.head.weight, average["head.weight"].half().float())
    assert not list(tmp_path.glob("**/*.partial"))


def test_a_training_goes_on_after_a_kill_in_any_stage(tmp_path, short, monkeypatch):
    """Each run is stopped in one stage more; what was done is not done again."""
    killed = []
    for stage in ("_codec", "_rooms", "world", "_decoder", "unseen", "_score"):
        with monkeypatch.context() as patch:

            def die(*_, stage=stage):
                killed.append(stage)
                raise KeyboardInterrupt

            if stage.startswith("_"):
                patch.setattr(train.Training, stage, die)
            else:
                patch.setattr(train_models.TRAINERS[stage].__globals__["Learner"], "update", die)
            with pytest.raises(KeyboardInterrupt):
                training("small", tmp_path).run()
    early = json.loads((tmp_path / "small.json").read_text())
    assert (early["db_to_the_renderer"], early["reached"]) == ({}, False)
    assert set(early["steps"]) == {"world", "unseen", "rollouts"}
    kept = {
        path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.suffix == ".pt"
    }
    card = training("small", tmp_path).run()
    assert len(killed) == 6
    assert card["db_to_the_renderer"]["explored"] > 0
    assert list(card["stages_s"]) == list(RECIPES["small"].shares)
    assert kept == {name: (tmp_path / name).stat().st_mtime_ns for name in kept}


def test_a_stage_goes_on_from_its_checkpoint(tmp_path, short, monkeypatch):
    """Killed between two checkpoints it loses what came after the first."""
    with monkeypatch.context() as patch:
        save = Learner.save

        def save_and_die(self, *paths):
            save(self, *paths)
            raise KeyboardInterrupt

        patch.setattr(Learner, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            training("small", tmp_path).run()
    before = torch.load(tmp_path / "world.checkpoint")
    assert 0 < before["elapsed_s"] < 3.0
    training("small", tmp_path).run()
    after = torch.load(tmp_path / "world.checkpoint")
    assert after["step"] > before["step"]
    assert after["losses"][: len(before["losses"])] == before["losses"]


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_what_counts_steps_stays_on_the_host_when_a_stage_goes_on(tmp_path, monkeypatch):
    """Each step would wait for the device to read it."""
    torch.manual_seed(0)
    first = Trainer(TinyWorld(TINY), Pace(1e-3, 1, 1 / 4, 10))
    for parameter in first.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.update(1.0)
    first.save(tmp_path / "world.checkpoint", tmp_path / "world-average.safetensors")
    load_state, loaded = Learner.load, []
    monkeypatch.setattr(
        Learner, "load", lambda self, state: (load_state(self, state), loaded.append(self))
    )
    meta = torch.device("meta")
    resumed = dataclasses.replace(training("small", tmp_path), device=meta)
    train_models.learn(0, resumed, "world", 0.0)
    muon, adamw = (optimizer.state.values() for optimizer in loaded[0].optimizers)
    assert {state["step"].device for state in adamw} == {CPU}
    assert {state["exp_avg"].device for state in adamw} == {meta}
    assert {state["momentum"].device for state in muon} == {meta}


def test_a_streaming_world_begins_with_the_weights_of_small(tmp_path, short, capsys):
    begin = tmp_path / "begin"
    begin.mkdir()
    torch.manual_seed(0)
    save_file(TinyWorld(TINY).state_dict(), begin / "small.safetensors")
    save_file(Codec().state_dict(), begin / "codec.safetensors")
    card = training("stream", tmp_path / "out", 2.0, begin / "small.safetensors").run()
    assert card["begun_with"] == "small.safetensors"
    assert card["recorded"] >= 1
    assert list(card["stages_s"]) == ["before", *RECIPES["stream"].shares]
    assert card["before"].keys() == card["db_to_the_renderer"].keys() == {"2 chunks"}
    assert card["steps"]["stream"] > 0
    assert card["reached"] is False
    assert "not reached" in capsys.readouterr().err
    copied = load_file(tmp_path / "out/codec.safetensors")
    assert torch.equal(
        copied["latent_mean"], load_file(begin / "codec.safetensors")["latent_mean"]
    )


def test_weights_that_are_given_keep_the_codec_that_they_were_trained_with(tmp_path, short):
    begin = tmp_path / "begin"
    begin.mkdir()
    torch.manual_seed(0)
    save_file(TinyWorld(TINY).state_dict(), begin / "small.safetensors")
    save_file(Codec().state_dict(), begin / "codec.safetensors")
    card = training("small", tmp_path / "out", 2.0, begin / "small.safetensors").run()
    assert {"codec", "decoder"}.isdisjoint(card["stages_s"])
    assert set(card["steps"]) == {"world", "unseen", "rollouts"}
    given, kept = (load_file(folder / "codec.safetensors") for folder in (begin, tmp_path / "out"))
    assert all(torch.equal(given[name], kept[name]) for name in given)


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [(None, 1.0, True), (0.5, 1.5, True), (1.5, 2.0, True), (1.5, 1.5, False),
     (1.5, 1.2, False), (0.5, 0.9, False), (0.5, None, False)],
)  # fmt: skip
def test_a_goal_is_reached_by_weights_that_are_better_than_before(
    before, after, reached, tmp_path
):
    for name, value in (("before", before), ("scores", after)):
        if value is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps({"explored": value}))
    card = training("base", tmp_path)._card({})
    assert card["goal"] == {"explored": 1.0}
    assert card["reached"] is reached
    assert card.get("before") == (None if before is None else {"explored": before})


def test_a_sampler_begins_with_the_weights_of_small_in_rooms_of_the_catalogue(
    tmp_path, short, capsys, monkeypatch
):
    begin = tmp_path / "begin"
    begin.mkdir()
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, rows=8, columns=8)
    save_file(TinyWorld(config).state_dict(), begin / "small.safetensors")
    save_file(Codec().state_dict(), begin / "codec.safetensors")
    recorded = []
    monkeypatch.setattr(
        train, "record", lambda seeds, *job: (recorded.append(seeds), data.record(seeds, *job))
    )
    recipe = dataclasses.replace(
        RECIPES["sampler"], config=config, rooms=2, on_cpu=SIZES,
        scored=((CATALOGUE_HELD_OUT_SEED,), (1,)), goal=("1 steps", 2.0),
    )  # fmt: skip
    job = (recipe, tmp_path / "out", CPU, 2.0, 1, begin / "small.safetensors")
    card = train.Training(*job).run()
    assert recorded == [range(CATALOGUE_SEED, CATALOGUE_SEED + 2)]
    assert card["steps"]["sampler"] > 0
    assert 0 <= card["share_of_pictures_named"]["1 steps"] <= 1
    assert card["reached"] is False
    told = json.loads((tmp_path / "out/imagined-sampler.json").read_text())
    assert set(told) == {"renderer", "codec", "1 steps"}
    assert 0 <= card["before"]["1 steps"] <= 1
    assert "share of pictures named, goal 2: not reached" in capsys.readouterr().err
    load("sampler", tmp_path / "out", config)
    # Everything is done: it says so again and trains nothing.
    assert train.Training(*job).run()["steps"] == card["steps"]


@pytest.fixture
def given(monkeypatch):
    """Seconds that each stage of base is given; none does anything."""
    given = {}
    for stage in RECIPES["base"].shares:
        method = f"_{stage}" if stage in ("rooms", "score") else "_learn"
        monkeypatch.setattr(
            train.Training, method,
            lambda self, *told, stage=stage: given.setdefault(
                told[0] if len(told) == 2 else stage, told[-1]
            ),
        )  # fmt: skip
    monkeypatch.setattr(train.Training, "_card", lambda self, done: done)
    return given


def test_time_that_a_stage_takes_too_long_is_taken_from_the_later_ones(
    tmp_path, monkeypatch, given
):
    monkeypatch.setattr(train, "_LEAST_FINISHING_S", 0.0)
    (tmp_path / "done.json").write_text(json.dumps({"rooms": 60.0}))
    train.Training(RECIPES["base"], tmp_path, CPU, 100.0, 1, None).run()
    shares = RECIPES["base"].shares
    assert "rooms" not in given
    left = 1 - shares["rooms"]
    assert given["world"] == pytest.approx(40 * shares["world"] / left)
    assert given["rollouts"] == pytest.approx(40 * shares["rollouts"] / left, rel=0.01)


@pytest.mark.parametrize(("seconds", "left_out"), [(200.0, True), (250.0, False)])
def test_time_in_which_finishing_stages_hardly_begin_goes_to_those_in_front(
    seconds, left_out, tmp_path, given
):
    done = train.Training(RECIPES["base"], tmp_path, CPU, seconds, 1, None).run()
    shares = dict(RECIPES["base"].shares)
    assert list(given) == [name for name in shares if name in given]
    assert ({"unseen", "rollouts"} & set(given) == set()) is left_out
    whole = 1 - (shares["unseen"] + shares["rollouts"]) * left_out
    assert given["rooms"] == pytest.approx(seconds * shares["rooms"] / whole)
    assert set(done) == set(shares)
    assert (done["unseen"] == done["rollouts"] == 0.0) is left_out


def test_a_stage_begins_with_the_weights_of_the_latest_one_that_was_not_left_out(tmp_path):
    given = tmp_path / "small.safetensors"
    made = training("base", tmp_path, init=given)
    assert made.latest("world") == made.latest("rollouts") == given
    (world := tmp_path / "world-average.safetensors").touch()
    assert made.latest("rollouts") == world
    (unseen := tmp_path / "unseen-average.safetensors").touch()
    assert made.latest("rollouts") == unseen
    assert made.latest("world") == given


def test_rooms_are_recorded_in_blocks_until_the_time_is_over(tmp_path, short, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 2)
    torch.manual_seed(0)
    codec = tmp_path / "codec.safetensors"
    save_file(Codec().state_dict(), codec)
    folder = tmp_path / "rooms"
    told: list[int] = []
    job = (folder, codec, (16, 8), CPU, 1)
    assert data.record(range(5), *job, 0.0, told.append) == 2
    first = (folder / "0.pt").stat().st_mtime_ns
    assert data.record(range(5), *job, 60.0, told.append) == 5
    assert (folder / "0.pt").stat().st_mtime_ns == first
    assert told == [2, 2, 4, 5]
    rooms = data.load(folder, 16)
    assert rooms["latents"].shape == (5, data.VIEWS, data.FRAMES, 16, 2, 2)
    assert data.load(folder, 8)["latents"].shape[-2:] == (1, 1)
    walks = latent_walks(rooms)
    assert walks.latents.shape[:2] == (5, 2)
    assert torch.equal(walks.walls[3], rooms["latents"][3, -1])
    assert torch.equal(walks.w2c[4], data.draw(4).w2c)


def test_walks_are_recorded_until_the_time_is_over_and_there_are_enough(tmp_path, short):
    told: list[int] = []
    codec = Codec().eval().requires_grad_(False)
    record_walks(range(3000, 3009), tmp_path, codec, 0.0, told.append)
    assert told == [1]


def test_processes_draw_the_same_rooms_as_this_one():
    with data.workers(2) as over:
        drawn = list(over(data.draw, range(3)))
    for walk, seed in zip(drawn, range(3), strict=True):
        assert torch.equal(walk.w2c, data.draw(seed).w2c)
        assert walk.attributes == data.draw(seed).attributes


def test_positions_and_rays_of_base_are_those_of_small_seen_closer():
    """Four tokens of base lie where one of small does, so weights of small can begin with them."""

    def places(side: int) -> torch.Tensor:
        rotary = Rotary(side, side, 32)
        # The angle of the highest frequency is below pi, so it can be read back.
        angle = torch.atan2(rotary.sin, rotary.cos)[:, [1, 9]]
        return angle.unflatten(0, (side, side)).permute(2, 0, 1)

    for coarse, fine in (
        (places(8), places(16)),
        (pixel_directions(8, 8).permute(2, 0, 1), pixel_directions(16, 16).permute(2, 0, 1)),
    ):
        pooled = torch.nn.functional.avg_pool2d(fine, 2)
        torch.testing.assert_close(pooled, coarse, atol=1e-5, rtol=0)
    small, base = TinyWorld(SMALL).state_dict(), TinyWorld(BASE).state_dict()
    assert {k: v.shape for k, v in small.items()} == {k: v.shape for k, v in base.items()}


def test_base_without_weights_says_how_to_train_it(tmp_path):
    with pytest.raises(ValueError, match=r"got 'base'; have .*train --model base"):
        load("base", tmp_path)


BARE = """
import runpy, sys
sys.meta_path = [one for one in sys.meta_path if "editable" not in repr(one).lower()]
sys.argv[1:] = ["--help"]
runpy.run_module("lipass.examples.tinyworld.train", run_name="__main__")
"""


def test_a_checkout_where_nothing_is_installed_starts_it_from_its_tree(tmp_path):
    root = Path(__file__).parents[2]
    for name in ("lipass", "passes", "kernels", "examples", "pyproject.toml", "setup.py",
                 "constraints.txt"):  # fmt: skip
        (tmp_path / name).symlink_to(root / name)
    subprocess.run(["make", "-f", root / "Makefile", "tree"], cwd=tmp_path, check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "build/tree")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", BARE], env=environment, cwd=root, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "--init INIT" in done.stdout
