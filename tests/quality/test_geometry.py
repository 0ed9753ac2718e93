"""What true depth and cameras tell: does one place stay one place, and is the camera obeyed."""

import pytest
import torch
from torch.nn import functional as F

from lipass.quality import Space, consistency, followed


def test_the_true_walk_is_one_place(turning):
    found = consistency(*turning)
    assert found.photometric_db > 35
    assert found.geometric_px < 0.1


def test_a_shift_by_a_pixel_is_a_pixel(turning):
    frames, space = turning
    half = Space(space.w2c[:16], space.depth[:16], 60, 60)
    shifted = torch.cat([frames[:8], frames[8:16].roll(1, -1)])
    whole, part = (consistency(one, half, gap=8) for one in (frames[:16], shifted))
    assert part.geometric_px == pytest.approx(1, abs=0.2)
    assert part.photometric_db < whole.photometric_db - 5


def test_a_constant_offset_moves_nothing(turning):
    frames, space = turning
    frames = frames.clone()
    frames[::2] += 0.05
    found = consistency(frames, space, gap=1)
    assert found.geometric_px < 0.1
    assert found.photometric_db == pytest.approx(26, abs=1)


def test_a_frozen_picture_is_not_the_place(turning):
    frames, space = turning
    found = consistency(frames[:1].expand_as(frames), space)
    assert found.geometric_px > 1
    assert found.photometric_db < 25


def test_the_true_walk_follows_its_camera(turning):
    assert followed(*turning) == 1


def test_a_frozen_picture_follows_nothing(turning):
    frames, space = turning
    assert followed(frames[:1].expand_as(frames), space) == 0


def test_a_mirrored_walk_goes_the_other_way(turning):
    frames, space = turning
    back = torch.cat([frames[12:], frames[12:].flip(0)])
    assert followed(back, space) < 0.2


def test_a_camera_that_stands_is_followed_by_nobody(turning):
    frames, space = turning
    still = Space(space.w2c[:1].expand(4, 4, 4), space.depth[:4], 60, 60)
    assert followed(frames[:4], still) is None


def test_bare_walls_tell_nothing(turning):
    _, space = turning
    flat = torch.full((24, 3, 48, 48), 0.5)
    assert followed(flat, space) is None
    assert consistency(flat, space).geometric_px is None


def test_views_that_share_nothing_are_not_compared(turning):
    frames, space = turning
    assert consistency(frames, space, gap=23) is not None  # the walk ends where it began
    turned = space.w2c.clone()
    turned[:, :3, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0])).double() @ turned[:, :3, :3]
    far = Space(torch.cat([space.w2c[:4], turned[4:8]]), space.depth[:8], 60, 60)
    assert consistency(frames[:8], far, gap=4) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": torch.zeros(24, 48, 48)}, "depth must be positive"),
        ({"w2c": torch.eye(4).expand(3, 4, 4)}, r"matrices \[24, 4, 4\]"),
        ({"hfov_deg": 0.0}, "between 0 and 180 degrees"),
    ],
    ids=["depth", "cameras", "view"],
)
def test_spaces_that_cannot_be_are_refused(change, said, turning):
    _, space = turning
    given = {"w2c": space.w2c, "depth": space.depth, "hfov_deg": 60.0, "vfov_deg": 60.0}
    with pytest.raises(ValueError, match=said):
        Space(**{**given, **change})


def test_depth_of_other_frames_is_refused(turning):
    frames, space = turning
    with pytest.raises(ValueError, match="depth must be of the frames"):
        followed(frames[:5], space)
    with pytest.raises(ValueError, match="depth must be of the frames"):
        consistency(F.avg_pool2d(frames, 2), space)
