"""The demo of the streaming world, with a model that has not learned anything."""

import json
import re

import pytest
import torch

from lipass import cli
from lipass.examples.tinyworld import stream_demo
from lipass.examples.tinyworld.model import ModelConfig
from lipass.examples.tinyworld.stream import StreamWorld
from lipass.examples.tinyworld.weights import load_stream


@pytest.fixture
def untrained(monkeypatch, fresh_dynamo):
    torch.manual_seed(0)
    model = StreamWorld(ModelConfig(width=48, heads=1, blocks=1)).eval().requires_grad_(False)
    _, codec = load_stream()
    monkeypatch.setattr(stream_demo, "load_stream", lambda: (model, codec))
    monkeypatch.setitem(stream_demo.CHUNKS, "quick", 16)


def test_demo_of_the_stream_reports_what_each_way_read(untrained, tmp_path, capsys):
    assert (
        cli.main(["demo", "--model", "stream", "--quick", "--json", "--out", str(tmp_path)]) == 0
    )
    rows = {row["preset"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["off", "window", "all"]
    # Behind 8 given chunks as many are generated: dense reads 32, 36 ... 60 latents.
    assert rows["off"]["context_latents_mean"] == 46
    assert rows["all"]["context_latents_mean"] <= 1 + 4 + 8 * 4
    times = {name: row["dit_core_s"] for name, row in rows.items()}
    assert {name: row["speedup_vs_off"] for name, row in rows.items()} == {
        name: times["off"] / seconds for name, seconds in times.items()
    }
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    reasons = {run["preset"]: run["chunks"][-1]["reasons"] for run in receipt["rollouts"]}
    assert set(reasons["all"].values()) > {"window", "sink"}
    assert "all makes these frames" in _text(tmp_path / "report.html")


def test_presets_of_the_other_model_are_refused(capsys, tmp_path):
    given = ["demo", "--model", "stream", "--also", "cache", "--quick", "--out", str(tmp_path)]
    assert cli.main(given) == 2
    assert "--also adds presets to the model small, got 'cache'" in capsys.readouterr().err


def _text(page):
    return re.sub(r"<[^>]+>", "", page.read_text())
