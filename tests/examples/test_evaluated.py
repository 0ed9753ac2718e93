"""TinyWorld under `lipass eval`, and the walks that are made to be hard."""

import dataclasses
import itertools
import json
import time
from types import SimpleNamespace

import pytest
import torch

from lipass.cli import main
from lipass.examples.tinyworld import (
    compare,
    evaluated,
    rivals,
    stream_compare,
    stream_evaluated,
)
from lipass.examples.tinyworld.camera import invert
from lipass.examples.tinyworld.codec import Codec
from lipass.examples.tinyworld.hard_scenes import HARD, scene_of
from lipass.examples.tinyworld.model import ModelConfig, TinyWorld
from lipass.examples.tinyworld.scenario import REGIMES
from lipass.examples.tinyworld.world import is_free, make_room, render, render_depth
from lipass.kernels.registry import SiteCounts
from lipass.quality import Space, consistency

TINY = ModelConfig(width=48, heads=1, blocks=1)


@pytest.fixture
def codec():
    return Codec().eval().requires_grad_(False)


@pytest.fixture
def untrained(monkeypatch, codec, fresh_dynamo):
    model = TinyWorld(TINY).eval().requires_grad_(False)
    monkeypatch.setattr(evaluated, "load", lambda: (model, codec))


def ran(capsys, *arguments):
    code = main(["eval", *arguments, "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


@pytest.mark.parametrize("name", HARD)
def test_hard_walks_come_back_and_stay_in_their_room(name):
    hard = HARD[name](9301)
    assert hard.w2c.shape == (64, 4, 4)
    last = hard.w2c[-2:]  # the way back may lead a step further than the way out
    assert any(torch.allclose(hard.w2c[0], one, atol=1e-4) for one in last)
    places = invert(hard.w2c)[:, :3, 3].tolist()
    inside = [is_free(hard.room, x, z, 0.1) for x, _, z in places]
    assert sum(inside) >= 0.8 * len(inside)


def test_a_hard_scene_is_recorded_to_its_half_or_its_first_chunk(codec):
    given = {regime: len(scene_of("fog", regime, 9301, codec).given) for regime in REGIMES}
    assert given == {"explored": 32, "free": 4}
    with pytest.raises(ValueError, match="a scene is one of"):
        scene_of("nowhere", "free", 9301, codec)


def test_depth_is_that_of_the_picture():
    hard = HARD["door"](9301)
    w2c = hard.w2c[:6]
    frames, depth = render(hard.room, w2c, [hard.attributes])[0], render_depth(hard.room, w2c)
    found = consistency(frames, Space(w2c, depth, 75, 75), gap=2)
    assert found.photometric_db > 33
    assert found.geometric_px < 0.2


def test_presets_and_loops_are_evaluated_alike(untrained, tmp_path, capsys):
    out = tmp_path / "eval.jsonl"
    asked = ["--quick", "--trajectory", "left/right", "--regime", "explored", "--out", str(out)]
    asked += ["--method", "all", "--method", "2 steps"]
    found = ran(capsys, *asked)
    values = {(row["method"], row["metric"]): row["value"] for row in found["rows"]}
    assert {method for method, _ in values} == {"off", "all", "2 steps"}
    assert values["off", "steps_per_chunk"] == 4
    assert values["2 steps", "steps_per_chunk"] == 2
    assert values["all", "context_latents_mean"] < values["off", "context_latents_mean"]
    for metric in ("psnr_vs_off_db", "loop_score", "photometric_db", "latency_s_p95"):
        assert ("all", metric) in values
    assert all(values[method, "recompiles"] == 0 for method in ("off", "all", "2 steps"))


def test_the_streaming_world_is_evaluated_too(
    untrained_stream, monkeypatch, codec, tmp_path, capsys, fresh_dynamo
):
    model = untrained_stream(TINY)
    monkeypatch.setattr(stream_evaluated, "load_stream", lambda: (model, codec))
    monkeypatch.setattr(stream_evaluated, "_CHUNKS", {"16 chunks": 6})
    masses = itertools.count()  # one more in each chunk

    def telemetry():
        return {"site": SiteCounts("site", kept_mass=next(masses), mass_samples=1)}

    counted = SimpleNamespace(reset_telemetry=lambda: None, telemetry=telemetry)
    monkeypatch.setattr(stream_compare, "registry", counted)
    asked = ["--model", "stream", "--quick", "--rooms", "9301", "--out", str(tmp_path / "r")]
    found = ran(capsys, *asked, "--method", "window 4")
    values = {(row["method"], row["metric"]): row["value"] for row in found["rows"]}
    assert values["window 4", "kv_bytes_peak"] < values["dense", "kv_bytes_peak"]
    assert values["dense", "loop_score"] <= 1
    assert values["dense", "recompiles"] == 0
    assert values["dense", "kept_mass"] % 1 == 0.5  # the mean of six chunks, not of the last


def test_another_seed_is_other_noise_in_the_same_scene(untrained):
    scope = dataclasses.replace(
        evaluated.SCOPES["quick"], methods=("off",), trajectories=("loop",), seeds=(0, 1)
    )
    subject = evaluated.subject(scope)
    made = {}
    for case in subject.cases[:1] + subject.cases[2:3]:
        scene = subject.scene(case)
        made[case.seed] = scene, subject.roll_out("off", case, scene)
    assert made.keys() == {0, 1}
    assert torch.equal(made[0][0].truth, made[1][0].truth)
    assert not torch.equal(made[0][1].latents, made[1][1].latents)


def test_what_a_rollout_compiles_and_waits_for_is_its_own(untrained, monkeypatch):
    scope = dataclasses.replace(evaluated.SCOPES["quick"], trajectories=("left/right",))
    subject = evaluated.subject(scope)
    case = next(one for one in subject.cases if one.regime == "free")
    scene, told = subject.scene(case), []

    def clock():
        told.append("looked at the clock")
        return time.perf_counter()

    encoded, graphs = subject._text, itertools.count()  # a graph between any two looks
    monkeypatch.setattr(subject, "_text", lambda case: (told.append("encoded"), encoded(case))[1])
    for module in (compare, rivals):
        monkeypatch.setattr(module, "graphs_compiled", lambda: next(graphs))
    monkeypatch.setattr(evaluated, "time", SimpleNamespace(perf_counter=clock))
    for method in ("off", "2 steps", "off"):
        assert subject.roll_out(method, case, scene).figures["recompiles"] == 1
        assert told[-4:] == ["encoded", *["looked at the clock"] * 3]


def test_results_of_another_codec_are_others(monkeypatch, tmp_path):
    weights = evaluated.SHIPPED / "small.safetensors"
    before = evaluated.settings_of(weights, "eager")
    (tmp_path / "codec").write_bytes(b"another")
    monkeypatch.setattr(evaluated, "CODEC", tmp_path / "codec")
    after = evaluated.settings_of(weights, "eager")
    assert {key for key in before if before[key] != after[key]} == {"codec"}


def test_rooms_of_doors_have_a_partition():
    assert HARD["door"](9301).room.layout == "partition"
    assert make_room(9301).layout != "partition"
