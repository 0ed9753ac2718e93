import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipass.kernels.view_overlap import api
from lipass.kernels.view_overlap.api import view_overlap
from lipass.kernels.view_overlap.reference import view_overlap_reference

HFOV, VFOV, NEAR, FAR = 60.0, 35.0, 0.5, 8.0


def pose(yaw_deg=0.0, pitch_deg=0.0, roll_deg=0.0, position=(0.0, 0.0, 0.0), dtype=torch.float64):
    """World to camera; yaw turns right, pitch looks up, roll turns about the view axis."""

    def rotate(axis, degrees):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        matrix = torch.eye(3, dtype=torch.float64)
        matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
        return matrix

    rotation = rotate(1, yaw_deg) @ rotate(0, pitch_deg) @ rotate(2, roll_deg)
    w2c = torch.eye(4, dtype=torch.float64)
    w2c[:3, :3] = rotation.T
    w2c[:3, 3] = -rotation.T @ torch.tensor(position, dtype=torch.float64)
    return w2c.to(dtype)


def score(query, memory, hfov=HFOV, vfov=VFOV):
    return view_overlap(query[None], memory[None], hfov, vfov, NEAR, FAR)[0, 0].item()


angles = st.floats(-180, 180)
places = st.tuples(*[st.floats(-4, 4)] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=25, deadline=None)
@given(yaw=angles, pitch=st.floats(-80, 80), roll=angles, place=places)
def test_identical_views_score_exactly_one(dtype, yaw, pitch, roll, place):
    view = pose(yaw, pitch, roll, place, dtype)
    assert score(view, view) == 1.0


@settings(max_examples=25, deadline=None)
@given(yaw=angles, pitch=st.floats(-60, 60), roll=angles, place=places)
def test_agrees_with_the_definition(yaw, pitch, roll, place):
    query, memory = pose(5, -3, 2, (0.3, 0.1, -0.2)), pose(yaw, pitch, roll, place)
    expected = view_overlap_reference(query.tolist(), memory.tolist(), HFOV, VFOV, NEAR, FAR)
    assert score(query, memory) == pytest.approx(expected, abs=2e-3)


@settings(max_examples=40, deadline=None)
@given(yaw=angles, pitch=st.floats(-89, 89), roll=angles, place=places, turn=st.floats(-9, 9))
def test_view_that_is_ruled_out_shows_not_a_single_point(yaw, pitch, roll, place, turn):
    queries = torch.stack([pose(5, -3, 2, (0.3, 0.1, -0.2)), pose(5 + turn, -3, 2, (0.3, 0.1, 0))])
    memory = torch.stack([pose(yaw + 7 * i, pitch, roll, place) for i in range(52)])
    may = api.may_see(queries, memory, HFOV, VFOV, NEAR, FAR)
    seen = api.point_visibility(queries, memory, HFOV, VFOV, NEAR, FAR)
    assert not seen[:, ~may].any()


def test_most_views_to_other_sides_are_ruled_out():
    memory = torch.stack([pose(yaw) for yaw in range(0, 360, 5)])
    may = api.may_see(pose()[None], memory, HFOV, VFOV, NEAR, FAR)
    seen = api.point_visibility(pose()[None], memory, HFOV, VFOV, NEAR, FAR)[0].amax(1) > 0
    assert (may & ~seen).sum() <= 8
    assert may.sum() < 36


@pytest.mark.parametrize("turn", [60.0, 60.5, 75, 90, 180, -60, -90])
def test_turned_by_the_field_of_view_or_more_scores_exactly_zero(turn):
    assert score(pose(), pose(turn)) == 0.0


@pytest.mark.parametrize("turn", [35.0, 60, 180, -35, -90])
def test_tilted_by_the_field_of_view_or_more_scores_exactly_zero(turn):
    assert score(pose(), pose(pitch_deg=turn)) == 0.0


def test_turned_by_half_the_field_of_view_scores_about_half():
    assert score(pose(), pose(30)) == pytest.approx(0.5, abs=0.1)


def test_turning_further_never_scores_higher():
    scores = [score(pose(), pose(degrees)) for degrees in range(0, 181, 3)]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("direction", [(1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (0, 0, -1.0)])
def test_moving_away_scores_lower_step_by_step(direction):
    scores = [
        score(pose(), pose(position=tuple(0.1 * step * axis for axis in direction)))
        for step in range(30)
    ]
    assert scores[0] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(scores))


def test_a_frame_far_behind_shows_less_than_a_frame_close_behind():
    """What a camera walks towards has been seen, but not in detail."""
    near_behind, far_behind = pose(position=(0, 0, -0.2)), pose(position=(0, 0, -2.5))
    assert score(pose(), near_behind) > 0.85
    assert score(pose(), far_behind) < 0.55


def test_roll_by_half_a_turn_shows_the_same_and_by_a_quarter_less():
    assert score(pose(), pose(roll_deg=180)) == pytest.approx(1.0, abs=1e-6)
    assert 0.3 < score(pose(), pose(roll_deg=90)) < 0.8


def test_roll_of_both_cameras_changes_nothing():
    upright = score(pose(), pose(20, position=(0.2, 0, 0.1)))
    tilt = pose(roll_deg=30)
    assert score(tilt @ pose(), tilt @ pose(20, position=(0.2, 0, 0.1))) != pytest.approx(upright)
    moved = pose(40, 10, 30, (1, 2, 3))
    rigid = score(pose() @ moved, pose(20, position=(0.2, 0, 0.1)) @ moved)
    assert rigid == pytest.approx(upright, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(yaw=st.floats(-70, 70), pitch=st.floats(-40, 40), x=st.floats(-1, 1), z=st.floats(-1, 1))
def test_mirror_images_score_the_same(yaw, pitch, x, z):
    here = score(pose(), pose(yaw, pitch, position=(x, 0, z)))
    there = score(pose(), pose(-yaw, pitch, position=(-x, 0, z)))
    assert here == pytest.approx(there, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batch_dimensions_and_dtype(dtype):
    query = torch.stack([pose(3.0 * i) for i in range(4)]).to(dtype)
    memory = torch.stack([pose(10.0 * i, position=(0.1 * i, 0, 0)) for i in range(5)]).to(dtype)
    scores = view_overlap(
        query.expand(2, 3, 4, 4, 4), memory.expand(2, 3, 5, 4, 4), HFOV, VFOV, NEAR, FAR
    )
    assert scores.shape == (2, 3, 4, 5)
    assert scores.dtype == dtype
    one = view_overlap(query[2:3], memory[3:4], HFOV, VFOV, NEAR, FAR)
    torch.testing.assert_close(scores[1, 2, 2, 3], one[0, 0])


def test_no_memory_gives_an_empty_row():
    assert view_overlap(pose()[None], torch.empty(0, 4, 4), HFOV, VFOV, NEAR, FAR).shape == (1, 0)


def test_finer_grids_agree(monkeypatch):
    views = [pose(12), pose(-25, 5), pose(position=(0.3, 0, 0.2)), pose(8, position=(0, 0, -1.0))]
    coarse = [score(pose(), view) for view in views]
    for name in ("COLUMNS", "ROWS", "DEPTHS"):
        monkeypatch.setattr(api, name, 4 * getattr(api, name))
    assert coarse == pytest.approx([score(pose(), view) for view in views], abs=0.025)


def test_repeats_exactly_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    first = score(pose(), pose(17, 3, 5, (0.2, 0.1, 0.4)))
    assert score(pose(), pose(17, 3, 5, (0.2, 0.1, 0.4))) == first
    assert torch.equal(state, torch.get_rng_state())


def test_operator_traces_with_a_dynamic_number_of_frames():
    query = torch.stack([pose(3.0 * i) for i in range(4)])[None]

    def prune(memory):
        return torch.ops.lipass.view_overlap(query, memory, HFOV, VFOV, NEAR, FAR) > 0.3

    compiled = torch.compile(prune, backend="eager", fullgraph=True, dynamic=True)
    for frames in (3, 6):
        memory = torch.stack([pose(15.0 * i) for i in range(frames)])[None]
        assert torch.equal(compiled(memory), prune(memory))
        assert compiled(memory).shape == (1, frames)


def test_operator_passes_opcheck():
    query, memory = pose()[None, None], torch.stack([pose(20), pose(40)])[None]
    torch.library.opcheck(
        torch.ops.lipass.view_overlap.default, (query, memory, HFOV, VFOV, NEAR, FAR)
    )
