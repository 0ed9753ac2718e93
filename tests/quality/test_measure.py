"""All figures of a rollout, and the word for them."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

from lipass.quality import (
    METRICS,
    Rollout,
    Scene,
    Verdict,
    bootstrap,
    measure,
    psnr_db,
    psnr_each_db,
    verdict,
)
from lipass.quality.figures import worst_and_typical
from lipass.quality.verdicts import MEANINGS, of


@pytest.fixture
def case(toy):
    subject = toy()
    scene = subject.scene(subject.cases[0])
    made = {name: subject.roll_out(name, subject.cases[0], scene) for name in subject.methods}
    return scene, made


def test_every_figure_of_a_close_video_is_found(case):
    scene, made = case
    found = measure(made["close"], scene, made["dense"])
    lacking = {name for name, value in found.items() if value is None}
    assert lacking == {
        "latency_s_p50", "latency_s_p95", "kv_bytes_peak", "context_latents_mean",
        "steps_per_chunk", "kept_mass", "recompiles",
    }  # fmt: skip
    assert found.keys() == METRICS.keys()
    assert found["speedup_vs_off"] == pytest.approx(2)
    assert found["chunk_s_slope"] == pytest.approx(0)
    assert found["followed"] == 1
    assert of(found, measure(made["dense"], scene)) is Verdict.UNCHANGED


@pytest.mark.parametrize(
    ("given", "frames"), [(4, 24), (1, 5), (0, 1)], ids=["walk", "few", "one frame in all"]
)
def test_a_world_that_generates_one_frame_at_a_time_is_measured(given, frames, case):
    scene, made = case
    space = dataclasses.replace(
        scene.space, w2c=scene.w2c[:frames], depth=scene.space.depth[:frames]
    )
    single = Scene(scene.w2c[:frames], given, 1, scene.truth[:frames], space)
    cut = {name: Rollout(one.frames[:frames], chunk_s=[0.1]) for name, one in made.items()}
    found = measure(cut["close"], single, cut["dense"])
    assert found["seam"] is None
    assert found["psnr_vs_off_worst_db"] <= found["psnr_vs_off_db"]
    assert of(found, measure(cut["dense"], single)) is Verdict.UNCHANGED


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chunk": 0}, "chunk must be a whole number from 1, got 0"),
        ({"given": 24}, "must leave frames to be generated, got given=24 of 24"),
        ({"given": -1}, "given must be a whole number from 0, got -1"),
    ],
    ids=["chunk", "nothing generated", "negative"],
)
def test_scenes_that_leave_nothing_to_measure_are_refused(change, said, case):
    scene, made = case
    with pytest.raises(ValueError, match=said):
        measure(made["close"], dataclasses.replace(scene, **change), made["dense"])


def test_recorded_frames_do_not_count(case):
    scene, made = case
    frames = made["close"].frames.clone()
    frames[:4] = 0.5
    found = measure(dataclasses.replace(made["close"], frames=frames), scene, made["dense"])
    dense = made["dense"].frames[4:]
    assert found["psnr_vs_off_db"] == pytest.approx(psnr_db(frames[4:], dense))


def test_what_is_not_known_is_not_measured(case):
    scene, made = case
    bare = dataclasses.replace(scene, truth=None, space=None)
    found = measure(Rollout(made["close"].frames), bare)
    known = {name for name, value in found.items() if value is not None}
    assert known == {"loop_score", "seam", "seam_worst"}


def test_values_that_are_no_numbers_break_a_video(case):
    scene, made = case
    found = measure(made["broken"], scene, made["dense"])
    assert found["psnr_vs_off_db"] is None
    assert found["chunk_s_p50"] == 0.1
    assert of(found, measure(made["dense"], scene)) is Verdict.BROKEN


def test_values_far_out_of_range_break_a_video_beside_a_dense_one_that_is_in_range(case):
    scene, made = case
    frames = made["close"].frames.clone()
    frames[20, 0, 0, 0] = 1e4
    found = measure(dataclasses.replace(made["close"], frames=frames), scene, made["dense"])
    assert found["psnr_vs_off_db"] is found["loop_score"] is None
    assert found["speedup_vs_off"] == pytest.approx(2)
    assert of(found, measure(made["dense"], scene)) is Verdict.BROKEN
    with pytest.raises(ValueError, match=r"frames must lie in 0..1, got .* to 1e\+04; scale"):
        measure(Rollout(frames), scene)  # nothing says that it is not of another scale


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda x: x * float("nan"), ValueError, "frames of the dense model must be finite"),
        (lambda x: x * 255, ValueError, "frames of the dense model must lie in 0..1"),
        (lambda x: (x * 255).byte(), TypeError, "divide bytes by 255"),
    ],
    ids=["nan", "range", "bytes"],
)
def test_a_dense_video_that_nothing_can_be_compared_with_is_refused(spoil, error, said, case):
    scene, made = case
    spoilt = dataclasses.replace(made["dense"], frames=spoil(made["dense"].frames))
    for name in ("close", "broken"):
        with pytest.raises(error, match=said):
            measure(made[name], scene, spoilt)


def test_bytes_beside_a_dense_video_are_a_mistake_and_not_broken(case):
    scene, made = case
    with pytest.raises(TypeError, match="frames must be a floating-point tensor"):
        measure(Rollout((made["close"].frames * 255).byte()), scene, made["dense"])


def test_the_worst_frame_is_one_of_the_worst_chunk(case):
    scene, made = case
    frames = made["dense"].frames.clone()
    frames[9] = (frames[9] + 0.3).clamp(0, 1)  # the single frame that is furthest
    frames[16:20] = (frames[16:20] + 0.2).clamp(0, 1)
    frames[18] = (frames[18] + 0.02).clamp(0, 1)
    assert int(psnr_each_db(frames, made["dense"].frames).argmin()) == 9
    worst, typical = worst_and_typical(Rollout(frames), made["dense"].frames, scene)
    assert worst == 18
    assert typical not in (9, 16, 17, 18, 19)


@pytest.mark.parametrize(
    ("mine", "dense"),
    [
        ([0.0] * 5, [0.2] * 5),
        ([0.1] * 5, [0.0] * 5),
        ([0.0, *[0.1] * 4], [0.2] * 5),
        ([0.1] * 5, [*[0.2] * 4, math.nan]),
    ],
)
def test_chunks_that_took_no_time_have_no_speed(mine, dense, case):
    scene, made = case
    timed = (dataclasses.replace(made["dense"], chunk_s=one) for one in (mine, dense))
    found = measure(next(timed), scene, next(timed))
    assert found["speedup_vs_off"] is None
    assert (found["chunk_s_slope"] is None) == (not any(mine))


def test_figures_are_numbers_that_can_be_written_down(case):
    scene, made = case
    odd = {"density": torch.tensor(0.5), "kept_mass": math.inf, "recompiles": math.nan}
    zero = dataclasses.replace(made["dense"], latents=torch.zeros(3))
    rollout = Rollout(made["close"].frames, torch.ones(3), torch.ones(5), odd)
    found = measure(rollout, scene, zero)
    assert found["density"] == 0.5
    assert {type(value) for value in found.values()} == {float, type(None)}
    assert found["kept_mass"] is found["recompiles"] is found["latent_error_vs_off"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((45, 0.99), Verdict.UNCHANGED),
        ((45, 0.95), Verdict.SAME_SCENE),
        ((31, 0.91), Verdict.SAME_SCENE),
        ((31, 0.89), Verdict.CHANGED),
        ((20, 0.7), Verdict.CHANGED),
        ((14, 0.7), Verdict.BROKEN),
        ((math.nan, None), Verdict.BROKEN),
        ((None, None), Verdict.BROKEN),
    ],
)
def test_thresholds(given, said):
    assert verdict(*given) is said


def test_another_picture_that_is_no_worse_is_not_broken():
    assert verdict(12, 0.4, truth_loss_db=0.5) is Verdict.CHANGED
    assert verdict(32, 0.95, truth_loss_db=3.1) is Verdict.BROKEN
    assert verdict(25, 0.8, truth_loss_db=0.1, loop_loss=0.3) is Verdict.BROKEN


def test_intervals_hold_the_mean_and_draw_rooms_as_wholes():
    values = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    alone = bootstrap(values)
    rooms = bootstrap(values, [1, 1, 2, 2, 3, 3])
    assert 1 < alone[0] < 2 < alone[1] < 3
    assert rooms == (1.0, 3.0)
    assert bootstrap(values, [1, 1, 1, 2, 2, 2]) is None


def test_page_names_every_figure_and_verdict():
    page = " ".join((Path(__file__).parents[2] / "docs/eval.md").read_text().split())
    assert [name for name in METRICS if f"`{name}`" not in page] == []
    for said, meaning in MEANINGS.items():
        assert f"**{said.value}**" in page
        assert re.sub(r"\s+", " ", meaning) in page
