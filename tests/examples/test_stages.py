"""The example as stages: side by side they show what one process shows, also after a steer."""

import pytest
import torch

import lipass
from lipass.examples.tinyworld.scenario import camera_path
from lipass.examples.tinyworld.stages import Decoder, Denoiser
from lipass.examples.tinyworld.world import make_room

LINE = [
    lipass.Stage("denoise", Denoiser, {"room": 9001, "inner": None}, threads=1),
    lipass.Stage("decode", Decoder, threads=1),
]


@pytest.fixture(scope="module")
def back():
    """Cameras of the way back, by chunks."""
    w2c, recorded = camera_path("left/right", "explored", make_room(9001))
    return w2c[:recorded].flip(0).unflatten(0, (-1, 4))


@pytest.fixture(scope="module")
def shown(back):
    """What is shown where a person turns round after two chunks, and five were asked for."""
    torch.set_num_threads(1)
    with lipass.Stages(LINE) as stages:
        return list(stages.run([*back[:2], *back[5:7]]))


def steered(stages, back):
    shown = []
    for n in range(3):
        stages.put(back[n], timeout_s=60.0)
    shown += [stages.get(), stages.get()]
    stages.put(back[3])
    assert stages.forget() == 2
    return [*shown, *stages.run(back[5:7])]


@pytest.mark.parametrize("apart", [False, True])
def test_steering_goes_on_from_what_was_shown(back, shown, apart):
    torch.set_num_threads(1)
    with lipass.Stages(LINE, apart=apart) as stages:
        for frames, expected in zip(steered(stages, back), shown, strict=True):
            assert frames.shape == (4, 64, 64, 3)
            assert torch.equal(frames, expected)
