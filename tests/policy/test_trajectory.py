import pytest
import torch

from lipass.policy.trajectory import parse_trajectory


def centre(w2c):
    return -(w2c[:, :3, :3].transpose(1, 2) @ w2c[:, :3, 3:])[..., 0]


def test_steps_give_one_pose_more_and_start_at_the_identity():
    poses = parse_trajectory("left-31, right-32")
    assert poses.shape == (64, 4, 4)
    assert torch.equal(poses[0], torch.eye(4))


def test_forward_and_back_return_to_the_start():
    poses = parse_trajectory("w-31, s-31")
    torch.testing.assert_close(poses[-1], torch.eye(4))
    torch.testing.assert_close(centre(poses)[31], torch.tensor([0.0, 0.0, 31 * 0.08]))


@pytest.mark.parametrize(
    ("text", "axis", "sign"), [("d-1", 0, 1), ("a-1", 0, -1), ("w-1", 2, 1), ("s-1", 2, -1)]
)
def test_moves_follow_opencv_axes(text, axis, sign):
    assert centre(parse_trajectory(text))[-1, axis] == pytest.approx(sign * 0.08)


@pytest.mark.parametrize(
    ("text", "axis", "sign"),
    [("right-1", 0, 1), ("left-1", 0, -1), ("up-1", 1, -1), ("down-1", 1, 1)],
)
def test_turns_point_the_view_axis_there(text, axis, sign):
    forward = parse_trajectory(text)[-1, 2, :3]
    assert forward[axis] * sign == pytest.approx(torch.tensor(3.0).deg2rad().sin().item())


def test_moving_after_a_turn_follows_the_view():
    end = centre(parse_trajectory("right-30, w-10", step_deg=3.0))[-1]
    torch.testing.assert_close(end, torch.tensor([0.8, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_all_poses_are_rigid():
    poses = parse_trajectory("left-7, up-5, w-3, d-2, down-9")
    rotation = poses[:, :3, :3]
    identity = torch.eye(3).expand_as(rotation)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), identity)


def test_both_grammars_mean_the_same():
    assert torch.equal(parse_trajectory("w*8,left*3"), parse_trajectory(" w-8, LEFT-3 "))


def test_step_sizes_are_arguments():
    poses = parse_trajectory("w-1, left-1", step_m=0.5, step_deg=90)
    torch.testing.assert_close(centre(poses)[1], torch.tensor([0.0, 0.0, 0.5]))
    torch.testing.assert_close(poses[2, 2, :3], torch.tensor([-1.0, 0, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "text", ["", " , ", "w", "w-", "w--3", "jump-3", "w-3.5", "left 3", "w-0"]
)
def test_malformed_text_is_refused(text):
    with pytest.raises(ValueError, match=r"got .*; try 'w-31"):
        parse_trajectory(text)
