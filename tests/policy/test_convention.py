import warnings

import pytest
import torch

import lipass
from lipass.policy.convention import inverted, looks_swapped
from lipass.policy.trajectory import parse_trajectory

WALK = "w-6, right-12, w-6"
FLIP = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))


def written(w2c, convention):
    """Write OpenCV world-to-camera matrices the way of a convention, by full products."""
    if "opengl" in convention:
        w2c = FLIP.to(w2c) @ w2c
    return torch.linalg.inv(w2c) if "c2w" in convention else w2c


@pytest.mark.parametrize(
    "convention", ["w2c", "c2w", "opencv", "opengl", "c2w-opengl", "opencv-c2w", "w2c-opengl"]
)
def test_session_decides_the_same_whatever_the_convention(convention):
    w2c = parse_trajectory(WALK)
    plans = []
    for name, cameras in (("w2c-opencv", w2c), (convention, written(w2c, convention))):
        session = lipass.Session(preset="all", convention=name)
        plans.append(session.chunk(poses=cameras[:16], query=cameras[16:20]).plan)
    assert plans[0].context.indices == plans[1].context.indices
    assert plans[0].revisit.allowed == plans[1].revisit.allowed


@pytest.mark.parametrize("convention", ["c2c", "w2c-c2w", "w2c,opengl", "", None, 3])
def test_other_conventions_are_refused(convention):
    with pytest.raises(ValueError, match="convention must be w2c or c2w and opencv or opengl"):
        lipass.Session(preset="all", convention=convention)


def test_cameras_that_are_none_are_refused_as_before():
    session = lipass.Session(preset="all", convention="c2w")
    scaled = parse_trajectory("w-8")
    scaled[2, :3, :3] *= 2
    with pytest.raises(ValueError, match="at latent 2; remove scale"):
        session.chunk(poses=scaled[:4], query=scaled[4:8])
    with pytest.raises(ValueError, match="shape"):
        session.chunk(poses=scaled[0], query=scaled[4:8])


@pytest.mark.parametrize(
    "path", [WALK, "right-15, w-10", "w-5, left-12, w-5, s-5", "w-4, right-16, s-6"]
)
def test_walk_that_turns_is_noticed_the_other_way_round(path):
    w2c = parse_trajectory(path)
    assert looks_swapped(inverted(w2c))
    assert not looks_swapped(w2c)


def arc(count, radius, inward):
    """Cameras on a circle about the origin that look inwards, or along the circle."""
    angle = torch.arange(count, dtype=torch.float64) * 0.15
    c2w = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    heading = angle + torch.pi if inward else angle + torch.pi / 2 + 0.075
    c2w[:, 0, 0] = c2w[:, 2, 2] = heading.cos()
    c2w[:, 0, 2], c2w[:, 2, 0] = heading.sin(), -heading.sin()
    c2w[:, 0, 3], c2w[:, 2, 3] = radius * angle.sin(), radius * angle.cos()
    return inverted(c2w)


def test_perfect_circle_says_nothing():
    """Inverted, it is the same circle walked backwards."""
    w2c = arc(16, 2.0, inward=False)
    w2c = w2c @ inverted(w2c)[0]
    assert not looks_swapped(w2c)
    assert not looks_swapped(inverted(w2c))


@pytest.mark.parametrize(
    "w2c",
    [
        parse_trajectory("w-20"),
        parse_trajectory("s-20"),
        parse_trajectory("right-20"),
        parse_trajectory("w-10, s-10"),
        parse_trajectory("right-2, s-10, w-3"),
        parse_trajectory("right-12, s-10"),
        parse_trajectory("right-29, a-10"),
        parse_trajectory("w-3, right-12, d-6"),
        arc(16, 2.0, inward=True),
        torch.eye(4).repeat(8, 1, 1),
    ],
    ids=[
        "forward",
        "back",
        "turn",
        "to-and-fro",
        "backwards",
        "turn-back",
        "aside",
        "both",
        "orbit",
        "still",
    ],
)
def test_motion_that_says_nothing_is_left_alone(w2c):
    assert not looks_swapped(w2c)


def rolled(convention, cameras):
    with lipass.Session(preset="all", convention=convention) as session:
        for start in (8, 12, 16, 20):
            with session.chunk(poses=cameras[:start], query=cameras[start : start + 4]):
                pass


def test_swap_is_told_once_with_the_remedy():
    with pytest.warns(lipass.LipassWarning) as told:
        rolled("w2c", inverted(parse_trajectory(WALK)))
    (one,) = [str(w.message) for w in told if "convention" in str(w.message)]
    assert "looks like c2w-opencv; if it is, open Session(..., convention='c2w-opencv')" in one


def test_swap_of_the_other_kind_is_told_too():
    with pytest.warns(lipass.LipassWarning, match="convention='w2c-opencv'"):
        rolled("c2w", parse_trajectory(WALK))


def test_right_convention_hears_nothing_of_it():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rolled("c2w", inverted(parse_trajectory(WALK)))
    assert not [w for w in told if "convention" in str(w.message)]
