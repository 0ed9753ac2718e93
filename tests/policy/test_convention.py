import pytest
import torch

import lipass
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
