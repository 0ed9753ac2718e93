import pytest
import torch
from page_blocks import block_of

import lipass
from lipass.calibration.device import device_name
from lipass.calibration.frontier import Cost, Frontier, Point
from lipass.examples import own_model
from lipass.policy.trajectory import parse_trajectory

PAGE = "docs/calibrate.md"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A frontier where the page has one."""
    options = {"context.memory_latents": 1}
    Frontier(
        options={"preset": "all", "chunk_latents": own_model.CHUNK_LATENTS},
        points=(Point("quick", options, 30.0, 3.0, 40.0, 36.5, 9.0, 2.0),),
        cost=Cost(30.0),
        default="quick",
        dense_ms=90.0,
        environment={"device": device_name()},
    ).save(tmp_path / "frontier.toml")
    monkeypatch.chdir(tmp_path)


@block_of(PAGE, 0)
def test_what_the_page_builds_is_calibrated(code, monkeypatch):
    monkeypatch.setattr(own_model, "ROWS", 2)
    monkeypatch.setattr(own_model, "COLUMNS", 2)
    short = {"parse_trajectory": lambda text: parse_trajectory("left-5, right-6")}
    names = {**vars(own_model), **short, "World": lambda: own_model.World(16, 2, 1)}
    exec(code, names)
    model, roll_out, walks, options = names["build"]()
    walks = {"way back": walks["way back"]}
    found = lipass.calibrate(
        model, roll_out, walks, options=options, tries=2, repeats=1, frames=0, compiled=False
    )
    assert found.frontier.options["chunk_latents"] == own_model.CHUNK_LATENTS
    assert found.frontier.points


@block_of(PAGE, 1)
def test_graph_and_session_of_the_page_agree(code, written):
    names = {"lipass": lipass, "torch": torch, "model": own_model.World()}
    exec(code, names)
    assert names["session"].config.context.memory_latents == 1
    own = lipass.Config.resolve(None, names["options"])
    assert own.fingerprint() == names["session"].config.fingerprint()


@block_of(PAGE, 2)
def test_a_session_of_the_page_has_a_target(code, written):
    names = {"lipass": lipass}
    exec(code, names)
    assert names["session"].pace.target_ms == 90
