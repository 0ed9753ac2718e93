"""Videos whose figures are known, and a model in miniature that `lipass eval` can roll out."""

import math

import pytest
import torch
from torch.nn import functional as F

from lipass.policy.trajectory import parse_trajectory
from lipass.quality import Rollout, Scene, Space
from lipass.quality.subject import Case

PIXELS, FOV_DEG = 48, 60.0


def textured(count=1, pixels=PIXELS, seed=0):
    """Smooth random pictures `[count, 3, pixels, pixels]` in 0..1."""
    drawn = torch.rand(
        count, 3, pixels // 4, pixels // 4, generator=torch.Generator().manual_seed(seed)
    )
    return F.interpolate(drawn, (pixels, pixels), mode="bicubic").clamp(0, 1)


@pytest.fixture
def pictures():
    """Return what makes such pictures."""
    return textured


def on_a_sphere(w2c, pixels=PIXELS):
    """Show a textured sphere of radius 5 from its middle: frames `[F, 3, P, P]` and depth."""
    at = (torch.arange(pixels) + 0.5) / pixels * 2 - 1
    half = math.tan(math.radians(FOV_DEG / 2))
    y, x = torch.meshgrid(at * half, at * half, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1)
    rays = rays / rays.norm(dim=-1, keepdim=True)
    frames, depth = [], []
    for pose in w2c:
        world = rays @ pose[:3, :3]
        waves = [torch.sin(9 * world[..., 0] + 7 * world[..., i] + i) for i in range(3)]
        frames.append(torch.stack(waves) * 0.4 + 0.5)
        depth.append(5 * rays[..., 2])
    return torch.stack(frames), torch.stack(depth)


@pytest.fixture
def turning():
    """A turn to the left and back before a textured sphere: frames and `Space`."""
    w2c = parse_trajectory("left-11, right-12", step_deg=4.0)
    frames, depth = on_a_sphere(w2c)
    return frames, Space(w2c, depth, FOV_DEG, FOV_DEG)


class Toy:
    """A subject whose methods spoil the truth in known ways."""

    name = "toy"
    methods = ("dense", "close", "broken")

    def __init__(self, rooms=(1, 2, 3)):
        self.settings = {"noise": 0.01}
        self.cases = [Case("turn", "explored", room) for room in rooms]
        self.asked = []

    def scene(self, case):
        w2c = parse_trajectory("left-11, right-12", step_deg=4.0)
        frames, depth = on_a_sphere(w2c)
        return Scene(w2c, 4, 4, frames, Space(w2c, depth, FOV_DEG, FOV_DEG))

    def roll_out(self, method, case, scene):
        self.asked.append((method, case))
        noise = torch.randn(scene.truth.shape, generator=torch.Generator().manual_seed(case.room))
        frames = (scene.truth + 0.01 * noise).clamp(0, 1)
        if method == "close":
            frames = (frames + 0.002).clamp(0, 1)
        if method == "broken":
            frames[12:] = float("nan")
        seconds = {"dense": 0.2}.get(method, 0.1)
        return Rollout(frames, frames[4:] * 1, [seconds] * 5, {"density": 1.0})


@pytest.fixture(scope="session")
def toy():
    """Return what makes such a subject."""
    return Toy
