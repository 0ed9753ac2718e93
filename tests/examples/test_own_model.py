"""The example of a model of one's own runs as it is, and README shows it word for word."""

from pathlib import Path

import pytest

import lipass
from lipass.examples import own_model

ROOT = Path(own_model.__file__).resolve().parents[1]


@pytest.mark.usefixtures("fresh_dynamo")
def test_example_drops_latents_and_reuses_steps(capsys, monkeypatch):
    monkeypatch.setattr(own_model, "ROWS", 4)
    monkeypatch.setattr(own_model, "COLUMNS", 4)
    own_model.main(inner="eager", walk="left-7, right-8")
    chunks = [chunk for chunk in lipass.report().chunks if chunk.plan.history_latents]
    assert any(chunk.steps_skipped for chunk in chunks)
    assert any(len(chunk.plan.context.indices) < chunk.plan.history_latents for chunk in chunks)
    assert all(site.action == "rewritten" for site in lipass.report().sites.values())
    assert "dense " in capsys.readouterr().out


def test_example_is_short_enough_to_read():
    assert len(Path(own_model.__file__).read_text().splitlines()) <= 100
