"""The process beside the demo: who takes a contender compiles it; nobody waits for the dead."""

import pytest
import torch

from lipass.examples.tinyworld.ahead import Ahead
from lipass.examples.tinyworld.scenario import Scenario, camera_path
from lipass.examples.tinyworld.world import Attributes, make_room

PRESETS = ("off", "all")


@pytest.fixture
def ahead():
    room, kind = make_room(9001), ("left/right", "explored")
    w2c, given = camera_path(*kind, room)
    truth, latents = torch.zeros(len(w2c), 3, 8, 8), torch.zeros(len(w2c), 16, 8, 8)
    scenario = Scenario(*kind, room, Attributes(), w2c, truth, latents[:given], latents)
    made = Ahead(PRESETS, "eager", scenario)
    yield made
    made.close()


def test_contender_is_taken_once(ahead):
    assert ahead.take("off")
    assert not ahead.take("off")


def test_what_is_not_taken_here_is_made_there(ahead):
    assert ahead.take("off")
    ahead.wait("all")
    assert (ahead.folder / "all.done").exists()
    assert not (ahead.folder / "off.done").exists()


def test_process_that_has_ended_is_not_waited_for(ahead):
    ahead._process.kill()
    ahead.wait("off")


def test_nothing_is_left_behind(ahead):
    folder = ahead.folder
    ahead.close()
    assert not folder.exists()
    assert ahead._process.returncode is not None
