import dataclasses
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lipass import receipt
from lipass.config import Config
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import ChunkRecord, PassRecord, SiteRecord, current_report, report
from lipass.session import Session

SITE = SiteRecord(
    name="blocks.3.attention",
    source="model.py:120",
    role="decode",
    grid=(4, 8, 8),
    segments=("text", "history", "current"),
    action="rewritten",
    reason="4 frames of 8x8 tokens after 4*n of history",
)
KEPT = SiteRecord("text_encoder.attention", "model.py:40", "text", None, ("text",), "kept", "text")


@pytest.fixture(autouse=True)
def _fresh_report():
    receipt.reset_report()
    yield
    receipt.reset_report()


def filled():
    live = current_report()
    live.add_site(SITE)
    live.add_site(KEPT)
    live.add_pass(PassRecord("sparse-attention", True, 0.25, ("%2 kept: text is short",)))
    live.add_graph(3.5)
    live.add_graph(1.0, recompile=True)
    poses = parse_trajectory("left-15, right-16")
    with Session(Config.resolve("all")) as session:
        for start in (4, 24):
            with session.chunk(poses=poses[:start], query=poses[start : start + 4]) as chunk:
                list(chunk.steps((1.0, 0.9, 0.8, 0.6, 0.0)))
    return live


def test_json_holds_everything_recorded():
    data = json.loads(filled().to_json())
    assert data["schema_version"] == receipt.SCHEMA_VERSION
    assert data["sites"][0]["segments"] == ["text", "history", "current"]
    assert data["passes"][0]["notes"] == ["%2 kept: text is short"]
    assert (data["graphs"], data["recompiles"], data["compile_s"]) == (2, 1, 4.5)
    plans = [chunk["plan"] for chunk in data["chunks"]]
    assert [plan["steps"]["reused"] for plan in plans] == [[], [1, 2]]
    assert plans[1]["context"]["frames"][0]["reason"] == "sink"


def test_table_fits_80_columns_and_names_what_happened():
    text = filled().table()
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "1 rewritten, 1 kept",
        "blocks.3.attention",
        "2/4",
        "revisits latent",
        "graphs 2",
    ):
        assert words in text


def test_long_names_lose_their_beginning_not_the_reason():
    current_report().add_site(
        SiteRecord("transformer." * 12 + "attn", "m.py:1", "decode", (4, "4*n"), (), "kept", "why")
    )
    text = current_report().table()
    assert max(map(len, text.splitlines())) <= 80
    assert ".." in text
    assert "attn  1  decode" in text
    assert "why" in text


def test_empty_report_renders():
    assert "0 rewritten, 0 kept" in current_report().table()
    assert json.loads(report().to_json())["chunks"] == []


def test_later_record_of_a_site_replaces_the_first():
    current_report().add_site(SITE)
    current_report().add_site(KEPT)
    current_report().add_site(SITE)
    assert list(current_report().sites) == [SITE.name, KEPT.name]


def test_layers_of_which_the_same_is_true_share_a_row():
    for layer in range(12):
        name, density = f"blocks.{layer}.attention", 0.3 + layer / 100
        current_report().add_site(replace(SITE, name=name, provider="cpu", density=density))
    table = current_report().table()
    assert "blocks.*.attention  12  decode  4x8x8  rewritten  0.30-0.41  cpu" in table
    assert table.count(SITE.reason) == 1


def counts(**changed):
    return SimpleNamespace(
        **{"calls": 8, "dense_calls": 0, "provider": "cpu", "density": 0.41, "reason": ""}
        | changed
    )


def test_report_fills_in_what_the_kernels_counted(monkeypatch):
    registry = SimpleNamespace(telemetry=lambda: {SITE.name: counts()})
    monkeypatch.setitem(sys.modules, "lipass.kernels.registry", registry)
    current_report().add_site(SITE)
    current_report().add_site(KEPT)
    site = report().sites[SITE.name]
    assert (site.provider, site.density, site.reason) == ("cpu", 0.41, SITE.reason)
    assert report().sites[KEPT.name] == KEPT
    assert current_report().sites[SITE.name] == SITE


def test_report_tells_calls_that_ran_dense(monkeypatch):
    counted = {SITE.name: counts(dense_calls=2, reason="dense is faster")}
    registry = SimpleNamespace(telemetry=lambda: counted)
    monkeypatch.setitem(sys.modules, "lipass.kernels.registry", registry)
    current_report().add_site(SITE)
    assert report().sites[SITE.name].reason.endswith("; 2 of 8 calls dense: dense is faster")


def test_old_chunks_are_forgotten_and_counted():
    filled()
    plan = current_report().chunks[-1].plan
    for _ in range(300):
        current_report().add_chunk(ChunkRecord(1, plan, 0.1, 0, 0))
    assert len(current_report().chunks) == 256
    assert current_report().chunks_forgotten == 46
    assert "46 earlier chunks not shown" in current_report().table()


def test_chunks_of_long_histories_are_forgotten_sooner():
    """A chunk is recorded with a decision for each latent, so many chunks would be a leak."""
    filled()
    plan = current_report().chunks[-1].plan
    frames = plan.context.frames
    frames = frames * (4000 // len(frames))
    plan = dataclasses.replace(plan, context=dataclasses.replace(plan.context, frames=frames))
    before = len(current_report().chunks) + current_report().chunks_forgotten
    for _ in range(50):
        current_report().add_chunk(ChunkRecord(1, plan, 0.1, 0, 0))
    kept = current_report().chunks
    assert 1 < len(kept) <= 4
    assert len(kept) + current_report().chunks_forgotten == before + 50
    endless = dataclasses.replace(
        plan, context=dataclasses.replace(plan.context, frames=frames * 10)
    )
    current_report().add_chunk(ChunkRecord(1, endless, 0.1, 0, 0))
    assert [chunk.plan for chunk in current_report().chunks] == [endless]


def test_sessions_are_numbered():
    assert [Session(preset="off").number for _ in range(2)] == [1, 2]
