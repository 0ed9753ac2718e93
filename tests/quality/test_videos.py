"""A frozen picture earns nothing, what gets worse in the middle is seen, and so are seams."""

import math

import pytest
import torch

from lipass.policy.trajectory import parse_trajectory
from lipass.quality import drift, loop_score, returns, seams
from lipass.quality.videos import slope


def test_a_walk_that_comes_back_returns_to_each_place():
    w2c = parse_trajectory("left-15, right-16")
    pairs = returns(w2c, first_generated=16)
    assert pairs[0] == (11, 19)
    assert pairs[-1] == (0, 30)
    assert returns(w2c, first_generated=16, gap=40) == []


@pytest.mark.parametrize(("roll_deg", "again"), [(0.0, True), (0.2, True), (90.0, False)])
def test_a_view_that_is_rolled_is_another_view(roll_deg, again):
    w2c = torch.eye(4).repeat(20, 1, 1)
    w2c[1:19, 2, 3] = torch.arange(1, 19)
    c, s = math.cos(math.radians(roll_deg)), math.sin(math.radians(roll_deg))
    w2c[19, :2, :2] = torch.tensor([[c, -s], [s, c]])
    assert (returns(w2c) == [(0, 19)]) is again


def test_a_walk_ahead_returns_nowhere(turning):
    assert returns(parse_trajectory("w-31")) == []
    assert loop_score(turning[0], []) is None


def test_a_camera_that_pauses_does_not_return(turning):
    standing = torch.eye(4).repeat(20, 1, 1)
    assert returns(standing) == []
    walk = parse_trajectory("left-15, right-15")
    paused = torch.cat([walk[:1].expand(12, 4, 4), walk])
    assert [pair for pair in returns(paused) if pair[1] < 16] == []
    assert returns(paused)[-1] == (0, 42)


def test_the_true_walk_scores_one(turning):
    frames, space = turning
    assert loop_score(frames, returns(space.w2c)) == pytest.approx(1, abs=1e-6)


def test_a_frozen_picture_gets_nothing(turning):
    frames, space = turning
    frozen = frames[:1].expand_as(frames)
    assert loop_score(frozen, returns(space.w2c)) == pytest.approx(0, abs=1e-9)


def test_a_picture_that_hardly_moves_gets_little(turning):
    frames, space = turning
    faint = frames[:1] + 0.05 * (frames - frames[:1])
    assert loop_score(faint, returns(space.w2c)) < 0.3


def test_another_place_at_the_return_scores_less(turning):
    frames, space = turning
    forgotten = torch.cat([frames[:12], frames[12:].flip(-1)])
    assert loop_score(forgotten, returns(space.w2c, 12)) < 0.7


def test_a_collapse_in_the_middle_is_drift_and_no_slope(pictures):
    truth = pictures(16)
    frames = truth + 0.01
    frames[4:8] += 0.09
    frames[8:12] += 0.09
    found = drift(frames, truth, 4)
    assert found.most_db == pytest.approx(20, abs=0.1)
    assert abs(found.slope_db) < 0.1


def test_a_steady_loss_has_its_slope(pictures):
    truth = pictures(8)
    errors = torch.tensor([0.01, 0.02, 0.04, 0.08]).repeat_interleave(2)
    found = drift(truth + errors[:, None, None, None], truth, 4)
    assert found.slope_db == pytest.approx(-6.02, abs=0.01)
    assert found.most_db == pytest.approx(18.06, abs=0.01)


def test_equal_pictures_do_not_drift(pictures):
    x = pictures(8)
    assert drift(x, x).most_db == 0
    assert drift(x[:3], x[:3]) is None


def test_a_constant_offset_at_a_seam_is_seen():
    frames = torch.linspace(0, 0.2, 12)[:, None, None, None].expand(12, 3, 4, 4).clone()
    assert seams(frames, 4).mean == pytest.approx(1, abs=1e-4)
    frames[8:] += 0.3
    found = seams(frames, 4)
    assert found.most == pytest.approx(1 + 0.3 / (0.2 / 11), abs=1e-3)
    assert found.mean == pytest.approx(1 + found.most / 2 - 0.5, abs=1e-3)


def test_the_first_generated_chunk_has_a_seam_with_what_was_recorded():
    frames = torch.linspace(0, 0.2, 12)[:, None, None, None].expand(12, 3, 4, 4).clone()
    frames[4:] += 0.3
    assert seams(frames, 4, first_generated=4).most > 10
    assert seams(frames, 4, first_generated=8).most == pytest.approx(1, abs=1e-4)


def test_where_nothing_moves_there_is_no_ratio(turning):
    frames, _ = turning
    assert seams(frames[:1].expand_as(frames), 4) is None
    assert seams(frames[:3], 4) is None


@pytest.mark.parametrize("count", [24, 1])
def test_chunks_of_one_frame_have_no_inside_and_so_no_seams(count, turning):
    assert seams(turning[0][:count], 1) is None
    assert seams(turning[0][:1], 4) is None
    with pytest.raises(ValueError, match="chunk must be a whole number from 1, got 0"):
        seams(turning[0][:count], 0)


@pytest.mark.parametrize(
    "figure",
    [
        lambda x: drift(x, torch.zeros(8, 3, 16, 16)),
        lambda x: seams(x, 4),
        lambda x: loop_score(x, [(0, 7)]),
    ],
    ids=["drift", "seams", "loop"],
)
def test_values_that_are_no_numbers_are_refused(figure):
    with pytest.raises(ValueError, match="frames must be finite"):
        figure(torch.full((8, 3, 16, 16), float("nan")))
    with pytest.raises(ValueError, match=r"must be pictures|must have one shape"):
        figure(torch.zeros(3, 16, 16))


def test_slope_is_by_least_squares():
    assert slope([1.0, 3.0, 5.0]) == pytest.approx(2)
    assert slope([7.0]) == 0
