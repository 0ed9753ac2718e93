import importlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import lipass
from lipass.options import ViewOptions
from lipass.policy.convention import Convention, inverted
from lipass.policy.plausibility import PoseCheck
from lipass.policy.trajectory import parse_trajectory

WALK = "w-6, right-12, w-6"
ROOT = Path(__file__).parents[2]
ROOM = ViewOptions(chunk_latents=4, hfov_deg=60.0, vfov_deg=35.0, near=0.5, far=8.0)


@pytest.fixture(scope="module")
def measured():
    """The benchmark's walks, mistakes and check."""
    import sys

    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.pose_check")
    sys.path.remove(str(ROOT))


def said(w2c, convention="w2c-opencv", view=ROOM, stream="main"):
    check = PoseCheck(view, Convention.parse(convention))
    w2c = w2c.double()
    told = [
        check.look(stream, w2c[:start], w2c[start : start + 4]) for start in range(0, len(w2c), 4)
    ]
    told = [one for one in told if one is not None]
    assert len(told) <= 1
    return told[0] if told else None


def flipped(w2c):
    return torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0])).to(w2c) @ w2c


def scaled(w2c, factor):
    w2c = w2c.clone()
    w2c[:, :3, 3] *= factor
    return w2c


TURNING = [WALK, "w-5, left-12, w-5, s-5", "w-4, right-16, s-6", "right-15, w-10, left-10, w-10"]
CORNERS = ", ".join(["w-8, right-10, w-8, left-20"] * 3)


@pytest.mark.parametrize("path", TURNING)
def test_walk_that_turns_is_noticed_the_other_way_round(path):
    w2c = parse_trajectory(path)
    assert "looks like c2w-opencv" in said(inverted(w2c))
    assert said(w2c) is None


def test_inverted_axes_are_named_by_where_the_walk_leads():
    """Matrices of OpenGL's world differ from OpenCV's by its axes, which no walk shows."""
    w2c = parse_trajectory(CORNERS)
    assert "convention='c2w-opencv'" in said(inverted(w2c))
    assert "convention='c2w-opengl'" in said(inverted(flipped(w2c)))


def test_backwards_all_the_way_round_corners_looks_like_opengl():
    w2c = parse_trajectory(CORNERS)
    assert "looks like w2c-opengl" in said(flipped(w2c))
    assert said(w2c) is None


def test_unit_is_told_with_the_steps_and_the_depths():
    w2c = parse_trajectory(WALK)
    told = said(scaled(w2c, 1000))
    assert "80 from latent to latent, near 0.5 and far 8; multiply poses[:, :3, 3]" in told
    assert "0.001 if they are in millimetres" in told
    assert "gets nowhere: 0.004" in said(scaled(parse_trajectory("w-31"), 0.05))


def test_depths_in_the_unit_of_the_cameras_are_a_remedy():
    far_away = ViewOptions(chunk_latents=4, hfov_deg=60.0, vfov_deg=35.0, near=500.0, far=8000.0)
    assert said(scaled(parse_trajectory(WALK), 1000), view=far_away) is None


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
    assert said(w2c) is None
    assert said(inverted(w2c)) is None


@pytest.mark.parametrize(
    "w2c",
    [
        parse_trajectory("w-20"),
        parse_trajectory("s-40"),
        parse_trajectory("right-20"),
        parse_trajectory("w-10, s-10"),
        parse_trajectory("right-2, s-10, w-3"),
        parse_trajectory("right-12, s-10"),
        parse_trajectory("s-30, right-12, s-30"),
        parse_trajectory("right-29, a-10"),
        parse_trajectory("w-3, right-12, d-6"),
        parse_trajectory("w-63", step_m=0.01),
        parse_trajectory("w-30", step_m=3.0),
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
        "back-round-a-corner",
        "aside",
        "both",
        "slow",
        "fast",
        "orbit",
        "still",
    ],
)
def test_motion_that_says_nothing_is_left_alone(w2c):
    assert said(w2c) is None


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_right_walks_of_all_kinds_hear_nothing(measured, precision):
    for kind in measured.KINDS:
        for w2c in measured.walks(kind, 5):
            rounded = torch.from_numpy(w2c).to(precision).double().numpy()
            assert measured.said(rounded) is None, kind


@pytest.mark.parametrize(
    ("mistake", "kind", "least"),
    [
        ("c2w", "tinyworld", 7),
        ("c2w", "person", 3),
        ("c2w", "flight", 10),
        ("w2c-opengl", "flight", 10),
        ("w2c-opengl", "mouse", 5),
        ("c2w-opengl", "flight", 10),
        ("mm", "keys", 10),
        ("mm", "tinyworld", 8),
        ("x0.05", "person", 8),
    ],
)
def test_mistakes_are_told_where_the_walk_shows_them(measured, mistake, kind, least):
    wrong = measured.MISTAKES[mistake]
    told = [measured.said(wrong(w2c)) for w2c in measured.walks(kind, 10)]
    assert sum(one is not None for one in told) >= least


def test_conventions_are_named_rightly_whatever_was_told(measured):
    """What the remedy names makes the walk right, and nothing more is told."""
    flip = measured.FLIP
    for told in ("w2c-opencv", "c2w-opencv", "w2c-opengl", "c2w-opengl"):
        for really in ("w2c-opencv", "c2w-opencv", "w2c-opengl", "c2w-opengl"):
            w2c = next(measured.walks("flight", 1))
            written = flip @ w2c if "opengl" in really else w2c
            written = np.linalg.inv(written) if "c2w" in really else written
            read = Convention.parse(told).to_w2c(torch.from_numpy(written))
            message = said(read, told)
            if told == really:
                assert message is None
            else:
                assert f"convention='{really}'" in message, (told, really, message)


def rolled(cameras, **options):
    with lipass.Session(**options) as session:
        for start in range(4, len(cameras) - 3, 4):
            with session.chunk(poses=cameras[:start], query=cameras[start : start + 4]):
                pass
        session.effect.told = True


def test_swap_is_told_once_with_the_remedy():
    with pytest.warns(lipass.LipassWarning) as told:
        rolled(inverted(parse_trajectory(CORNERS)), preset="all")
    (one,) = [str(w.message) for w in told]
    assert "looks like c2w-opencv; if it is, open Session(..., convention='c2w-opencv')" in one


@pytest.mark.parametrize(
    ("cameras", "options"),
    [
        (inverted(parse_trajectory(CORNERS)), {"preset": "all", "convention": "c2w"}),
        (inverted(parse_trajectory(CORNERS)), {"preset": "sparse"}),
        (scaled(parse_trajectory(CORNERS), 1000), {"preset": "off"}),
    ],
    ids=["right", "cameras-are-not-read", "off"],
)
def test_nothing_is_told_where_nothing_is_wrong_or_read(cameras, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rolled(cameras, **options)


def test_check_changes_no_decision():
    cameras = inverted(parse_trajectory(CORNERS))
    plans = []
    for told in (False, True):
        session = lipass.Session(preset="all")
        session.given._check._told = told
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plans.append(session.chunk(poses=cameras[:60], query=cameras[60:64]).plan)
    assert plans[0] == plans[1]


def test_streams_are_walks_of_their_own():
    check = PoseCheck(ROOM, Convention.parse("w2c"))
    ahead = parse_trajectory("w-31").double()
    aside = parse_trajectory("right-30, w-31").double()
    for start in range(0, 28, 4):
        assert check.look("a", ahead[:start], ahead[start : start + 4]) is None
        assert check.look("b", aside[:start], aside[start : start + 4]) is None
