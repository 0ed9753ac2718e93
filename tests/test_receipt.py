import dataclasses
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lipass import receipt
from lipass.compile.graph_breaks import GraphBreak
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
    assert "blocks.0-11.attention  12  decode  4x8x8  rewritten  0.30-0.41  cpu" in table
    assert table.count(SITE.reason) == 1


def counts(**changed):
    return SimpleNamespace(
        **{
            "role": "decode",
            "calls": 8,
            "dense_calls": 0,
            "sparse_calls": 8,
            "kept_plans": 0,
            "score_errors": None,
            "provider": "cpu",
            "density": 0.41,
            "mass": None,
            "reason": "",
        }
        | changed
    )


def test_report_fills_in_what_the_kernels_counted(monkeypatch):
    registry = SimpleNamespace(telemetry=lambda: {SITE.name: counts(mass=0.9)})
    monkeypatch.setitem(sys.modules, "lipass.kernels.registry", registry)
    current_report().add_site(SITE)
    current_report().add_site(KEPT)
    site = report().sites[SITE.name]
    assert (site.provider, site.density, site.reason) == ("cpu", 0.41, SITE.reason)
    assert site.kept_mass == 0.9
    assert report().sites[KEPT.name] == KEPT
    assert current_report().sites[SITE.name] == SITE


def test_report_tells_calls_that_ran_dense(monkeypatch):
    counted = {SITE.name: counts(dense_calls=2, reason="dense is faster")}
    registry = SimpleNamespace(telemetry=lambda: counted)
    monkeypatch.setitem(sys.modules, "lipass.kernels.registry", registry)
    current_report().add_site(SITE)
    assert report().sites[SITE.name].reason.endswith("; 2 of 8 calls dense: dense is faster")


def test_report_tells_how_often_blocks_were_chosen(monkeypatch):
    counted = {SITE.name: counts(kept_plans=6, sparse_calls=7)}
    registry = SimpleNamespace(telemetry=lambda: counted)
    monkeypatch.setitem(sys.modules, "lipass.kernels.registry", registry)
    current_report().add_site(SITE)
    assert report().sites[SITE.name].reason.endswith("; blocks chosen in 1 of 8 calls")


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


def test_layers_that_differ_in_names_of_nodes_and_times_share_a_row():
    for layer in range(54):
        reason = f"not shared: %cos_{layer} shares memory; predicted {layer}.31 ms sparse"
        current_report().add_site(replace(KEPT, name=f"blocks.{layer}.attn1", reason=reason))
    table = current_report().table()
    assert "blocks.0-53.attn1  54  text" in table
    assert table.count("not shared") == 1


def test_sites_that_ran_dense_in_every_call_are_not_shown_as_rewritten(monkeypatch):
    counted = {SITE.name: counts(calls=8, dense_calls=8, reason="the context is short")}
    registry = SimpleNamespace(telemetry=lambda: counted)
    monkeypatch.setitem(sys.modules, "lipass.kernels.registry", registry)
    current_report().add_site(SITE)
    table = report().table()
    assert "1 rewritten, 0 kept; 1 ran dense in every call" in table
    assert "decode  4x8x8  dense" in table
    assert "8 of 8 calls dense: the context is short" in " ".join(table.split())


def test_attention_over_pieces_is_dense_by_design(monkeypatch):
    counted = {SITE.name: counts(role="dense", dense_calls=8, reason="every key is visited")}
    registry = SimpleNamespace(telemetry=lambda: counted)
    monkeypatch.setitem(sys.modules, "lipass.kernels.registry", registry)
    current_report().add_site(SITE)
    assert "ran dense" not in report().table()


def test_reasons_are_told_in_full_within_80_columns():
    reason = " ".join(f"word{number}" for number in range(60))
    current_report().add_site(replace(KEPT, reason=reason))
    notes = (f"blocks.0: kept, {reason}", "blocks.1: found, not told", f"blocks.2: kept, {reason}")
    current_report().add_pass(PassRecord("share-blocks", False, 0.1, notes))
    current_report().add_pass(PassRecord("share-blocks", True, 0.1, notes))
    current_report().add_graph_break(GraphBreak("model.py:3", reason, reason))
    table = current_report().table()
    assert max(map(len, table.splitlines())) <= 80
    assert table.count("word59") == 4
    assert "blocks.0,2 x2: kept, word0" in table
    assert "share-blocks  1/2      0.20" in table
    assert "not told" not in table


def filled_plan():
    if not current_report().chunks:
        filled()
        current_report().sites.clear()
    return current_report().chunks[0].plan


def test_table_ends_with_the_speed_that_was_measured_and_what_it_cost():
    plan = filled_plan()
    current_report().chunks.clear()
    for index in range(1, 5):
        for preset, seconds in (("off", 1.0), ("all", 0.4)):
            for compiled, more in ((True, 9.0), (False, 0.0)):
                record = ChunkRecord(
                    1, dataclasses.replace(plan, index=index), seconds + more, 0, 0,
                    preset=preset, compiled=compiled,
                )  # fmt: skip
                current_report().add_chunk(record)
    current_report().presets[:] = ["off", "all"]
    last = " ".join(current_report().table().rpartition("\n\n")[2].split())
    assert "Measured over 4 chunks, 'all' is 2.50x as fast as 'off'." in last
    assert "Next: " in last


def test_chunks_that_compiled_say_nothing_of_speed():
    plan = filled_plan()
    current_report().chunks.clear()
    for index in range(4):
        for preset in ("off", "all"):
            chunk = dataclasses.replace(plan, index=index)
            current_report().add_chunk(
                ChunkRecord(1, chunk, 1.0, 0, 0, preset=preset, compiled=True)
            )
    assert "Measured" not in current_report().table()


@pytest.mark.parametrize(
    ("presets", "site", "said", "then"),
    [
        (
            ["off"],
            None,
            "Preset 'off' changes nothing",
            "Next: preset 'exact', which keeps results",
        ),
        (["exact"], KEPT, "to rounding (exact)", "Next: `lipass inspect` says where attention is"),
        (["exact"], SITE, "to rounding (exact)", "Next: preset 'all', which skips work"),
        (["all"], SITE, "Nothing was left out.", "Next: open a lipass.Session around the loop"),
        (
            ["all"],
            replace(SITE, action="kept", reason="its gradient is recorded; call the model"),
            "Nothing was left out.",
            "Next: call the model under torch.no_grad()",
        ),
        (
            ["all"],
            replace(SITE, density=0.25),
            "Skipped: 75% of the key blocks at 1 site. What is skipped changes results",
            "Next: open a lipass.Session",
        ),
        (
            ["all"],
            replace(SITE, density=0.25, kept_mass=0.9),
            "75% of the key blocks at 1 site, which held 10% of the attention (sampled).",
            "Next: open a lipass.Session",
        ),
    ],
)
def test_table_ends_with_what_changed_and_what_to_try(presets, site, said, then):
    current_report().add_graph(1.0, preset=presets[0])
    if site is not None:
        current_report().add_site(site)
    last = " ".join(current_report().table().rpartition("\n\n")[2].split())
    assert said in last
    assert then in last


@pytest.mark.parametrize("preset", ["off", "exact"])
def test_ending_of_an_exact_graph_tells_what_its_session_left_out(preset):
    current_report().add_graph(1.0, preset=preset)
    current_report().add_site(SITE)
    chunk_records(read=None)
    last = " ".join(current_report().table().rpartition("\n\n")[2].split())
    assert "Skipped: " in last
    assert "What is skipped changes results (approximate)" in last
    assert "Next: preset 'all'" not in last


def test_report_of_nothing_has_no_ending():
    assert "Next" not in current_report().table()


def chunk_records(read=None, asked=True):
    poses = parse_trajectory("left-15, right-16")
    with Session(Config.resolve("all")) as session:
        for start in (4, 24):
            with session.chunk(poses=poses[:start], query=poses[start : start + 4]) as chunk:
                if asked:
                    list(chunk.steps((1.0, 0.9, 0.8, 0.6, 0.0)))
                chunk.latents_read = read


def test_ending_says_first_that_more_was_read_than_was_chosen():
    current_report().add_graph(1.0, preset="all")
    current_report().add_site(replace(SITE, calls=2, dense_calls=2))
    chunk_records(read=24)
    said = " ".join(current_report().table().split())
    assert "Next: encode chunk.context only: 2 of 2 chunks read more" in said


def test_ending_says_that_no_chunk_was_asked_for_its_steps():
    current_report().add_graph(1.0, preset="all")
    current_report().add_site(SITE)
    chunk_records(asked=False)
    said = " ".join(current_report().table().split())
    assert "Next: loop over chunk.steps(sigmas)" in said


def test_ending_leaves_alone_that_some_sites_ran_dense():
    current_report().add_graph(1.0, preset="all")
    current_report().add_site(replace(SITE, calls=2, dense_calls=2))
    current_report().add_site(replace(SITE, name="blocks.4.attention", density=0.5, calls=2))
    chunk_records()
    assert "ran dense, above" not in current_report().table().replace("\n", " ")


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (8, "of the history"),
        (
            None,
            "% of the history: so does a loop that reads chunk.context; no compiled call shows",
        ),
    ],
)
def test_ending_counts_history_as_skipped_only_where_calls_show_what_they_read(read, said):
    current_report().add_graph(1.0, preset="all")
    current_report().add_site(SITE)
    chunk_records(read=read)
    last = " ".join(current_report().table().rpartition("\n\n")[2].split())
    assert said in last
    assert ("Skipped: " in last and "% of the history" in last.partition(". ")[0]) is bool(read)
