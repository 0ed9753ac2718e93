"""The world that is there to be copied is one, and short."""

from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from lipass.cli.play import load_world
from lipass.examples import own_model
from lipass.play.world import Controls


def test_it_is_a_world_and_follows_the_keys(monkeypatch, fresh_dynamo):
    monkeypatch.setattr(own_model, "ROWS", 4)
    monkeypatch.setattr(own_model, "COLUMNS", 4)
    world = load_world("lipass.examples.own_world:OwnWorld")
    world.inner = "eager"
    visit = world.visit(world.room)
    side = visit.side("fast")
    before = [side.make(i, visit.go(Controls(ahead=1)), (), "all") for i in range(3)][-1]
    world.compile("fast", lambda doing: None)
    made = [side.make(3 + i, visit.go(Controls(turn=1)), (), "all") for i in range(20)][-1]
    assert visit.camera.z > 1.0
    assert before.frames.shape == made.frames.shape == (4, 4, 4, 3)
    assert made.read < len(made.memory) == 64
    side.close()


def test_it_is_short_enough_to_be_copied():
    source = Path(own_model.__file__).with_name("own_world.py").read_text()
    assert len(source.splitlines()) <= 130
