import gc
import json
import logging
import os
import threading
import warnings

import pytest
import torch

import lipass
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import current_report, reset_report
from lipass.runtime.events import _without_numbers

WAY_BACK = parse_trajectory("left-15, right-16")
SIGMAS = [1.0, 0.75, 0.5, 0.25, 0.0]


def roll(chunks=6, fail_at=None, **options):
    """Plan chunks along a way back; nothing is computed."""
    with lipass.Session(**{"preset": "all", **options}) as session:
        session.effect.told = True  # no model runs here
        for index in range(chunks):
            now = index * 4
            with session.chunk(
                poses=WAY_BACK[:now] if now else None, query=WAY_BACK[now : now + 4]
            ) as chunk:
                for _ in chunk.steps(SIGMAS):
                    if index == fail_at:
                        raise FloatingPointError("of the model")


def names(events):
    return [event["name"] for event in events]


def test_file_gets_a_line_for_each_chunk_between_start_and_end(tmp_path):
    path = tmp_path / "events.jsonl"
    roll(events=path)
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert names(events) == ["lipass.session.start", *["lipass.chunk"] * 6, "lipass.session.end"]
    last = events[6]["attributes"]
    assert last["lipass.chunk.index"] == 5
    assert last["lipass.context.history_latents"] == 20
    kept, dropped = last["lipass.context.kept_latents"], last["lipass.context.dropped_latents"]
    assert kept + dropped == 20
    assert sum(last["lipass.context.kept_by"].values()) == kept
    assert sum(last["lipass.context.dropped_by"].values()) == dropped > 0
    assert last["lipass.steps.computed"] + last["lipass.steps.reused"] == 4
    took = events[6]["end_time_unix_nano"] - events[6]["start_time_unix_nano"]
    assert took == pytest.approx(last["lipass.chunk.seconds"] * 1e9, abs=2e3)
    assert events[7]["attributes"]["lipass.session.chunks"] == 6


def test_line_that_a_full_disk_has_cut_spoils_no_other(tmp_path, monkeypatch):
    written = []

    def write(file, line, real=os.write):
        written.append(line)
        return real(file, line[:40] if len(written) == 3 else line)

    monkeypatch.setattr(os, "write", write)
    with pytest.warns(lipass.LipassWarning, match="was cut short"):
        roll(4, events=tmp_path / "events.jsonl")
    monkeypatch.undo()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert len(lines[2]) == 40
    events = [json.loads(line) for place, line in enumerate(lines) if place != 2]
    assert events[-1]["attributes"]["lipass.session.events_lost"] == 1


def test_sessions_append_to_one_file(tmp_path):
    for _ in range(2):
        roll(2, events=str(tmp_path / "events.jsonl"))
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 8


def test_function_is_called_with_each_event():
    events = []
    roll(events=events.append)
    assert len(events) == 8
    assert json.loads(json.dumps(events)) == events


def test_environment_names_a_file_for_sessions_that_name_none(tmp_path, monkeypatch):
    monkeypatch.setenv("LIPASS_EVENTS", str(tmp_path / "all.jsonl"))
    own = []
    roll(2, events=own.append)
    assert not (tmp_path / "all.jsonl").exists()
    roll(2)
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == len(own) == 4


def test_nothing_is_written_where_nobody_asks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIPASS_EVENTS", raising=False)
    roll(2)
    assert not list(tmp_path.iterdir())


def test_chunk_that_fails_is_told_with_its_error():
    events = []
    with pytest.raises(FloatingPointError):
        roll(fail_at=2, events=events.append)
    assert names(events)[-2:] == ["lipass.chunk", "lipass.session.end"]
    failed = events[-2]["attributes"]
    assert failed["error.type"] == "FloatingPointError"
    assert failed["lipass.chunk.finished"] is False
    assert "lipass.steps.computed" not in failed
    assert events[-1]["attributes"]["lipass.session.chunks"] == 2


def test_attributes_are_what_a_collector_takes():
    events = []
    roll(events=events.append)
    for event in events:
        for name, value in event["attributes"].items():
            assert name.startswith(("lipass.", "process.", "error."))
            values = value if isinstance(value, list) else [value]
            values = list(value.values()) if isinstance(value, dict) else values
            assert all(isinstance(one, bool | int | float | str) for one in values), name


def test_compilations_are_counted_where_they_happen():
    reset_report()
    events = []
    with lipass.Session(preset="all", events=events.append) as session:
        session.effect.told = True
        for start in (0, 4):
            with session.chunk(query=WAY_BACK[start : start + 4], poses=WAY_BACK[:4]):
                if start:
                    current_report().add_graph(1.5, recompile=True)
    first, second = (event["attributes"] for event in events[1:3])
    assert first["lipass.compile.graphs"] == 0
    assert second["lipass.compile.graphs"] == second["lipass.compile.recompiles"] == 1
    assert second["lipass.compile.seconds"] == 1.5


def test_report_that_is_reset_under_way_counts_from_zero():
    events = []
    current_report().add_graph(1.0)
    with lipass.Session(preset="all", events=events.append) as session:
        session.effect.told = True
        with session.chunk(query=WAY_BACK[:4]):
            reset_report()
    assert events[1]["attributes"]["lipass.compile.graphs"] == 0


def test_sink_that_fails_is_told_once_and_the_rollout_goes_on():
    events = []

    def sink(event):
        if event["name"] == "lipass.chunk" and event["attributes"]["lipass.chunk.index"] < 3:
            raise ConnectionError("collector is away")
        events.append(event)

    with pytest.warns(lipass.LipassWarning) as told:
        roll(events=sink)
    (one,) = [str(warning.message) for warning in told]
    assert "got ConnectionError: collector is away" in one
    assert names(events) == [
        "lipass.session.start", *["lipass.chunk"] * 3, "lipass.session.end",
    ]  # fmt: skip
    assert events[-1]["attributes"]["lipass.session.events_lost"] == 3


@pytest.mark.parametrize("where", ["no/such/folder/events.jsonl", "."], ids=["missing", "folder"])
def test_path_that_takes_nothing_is_told_once(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(lipass.LipassWarning, match="the rollout goes on") as told:
        roll(events=where)
    assert len(told) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
def test_full_disk_is_told_once():
    with pytest.warns(lipass.LipassWarning, match="No space left") as told:
        roll(events="/dev/full")
    assert len(told) == 1


@pytest.mark.parametrize("events", [3, b"events.jsonl", ["events.jsonl"]])
def test_sink_of_another_kind_is_refused(events):
    with pytest.raises(TypeError, match="events must be a path or a function of one event, got"):
        lipass.Session(preset="all", events=events)


def test_interrupt_in_a_sink_is_no_error_of_it():
    def sink(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll(events=sink)


def test_threads_write_whole_lines(tmp_path):
    path = tmp_path / "events.jsonl"
    threads = [threading.Thread(target=roll, kwargs={"events": path}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 4 * 8


def test_decisions_are_those_without_events():
    plans = []
    for events in (None, lambda event: None):
        session = lipass.Session(preset="all", events=events)
        plans.append(session.chunk(poses=WAY_BACK[:20], query=WAY_BACK[20:24]).plan)
    assert plans[0] == plans[1]


def test_indices_are_bounded_where_all_is_kept():
    events = []
    poses = torch.eye(4).repeat(404, 1, 1)
    session = lipass.Session(preset="off", events=events.append)
    with session, session.chunk(poses=poses[:400], query=poses[400:]):
        pass
    attributes = events[1]["attributes"]
    assert attributes["lipass.context.kept_latents"] == 400
    assert len(attributes["lipass.context.indices"]) == 256


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("memory 0.83", "memory"),
        ("dropped: overlap 0.12 < 0.30", "overlap"),
        ("dropped: duplicates 12", "duplicates"),
        ("dropped: 3 memory latents show more", "memory latents show more"),
        ("kept: context policy is off", "context policy is off"),
        ("sink", "sink"),
    ],
)
def test_reasons_that_differ_in_numbers_are_one(reason, kind):
    assert _without_numbers(reason) == kind


def test_log_has_a_line_for_each_chunk(caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "lipass"):
        roll(3)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines if "chunk" in line][-1].endswith("chunk 2")
    assert "of 8 history latents, computed 4 of 4 steps, 0 graphs compiled" in lines[-1]
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "lipass"):
        roll(3)
    assert any(record.getMessage() == "  latent 0: sink" for record in caplog.records)


def test_a_session_that_is_left_open_closes_its_file_when_it_is_gone(tmp_path):
    path = tmp_path / "events.jsonl"
    session = lipass.Session(preset="all", events=path)
    with session.chunk(query=WAY_BACK[:4]) as chunk:
        list(chunk.steps(SIGMAS))
    descriptor = session.events._file
    os.fstat(descriptor)
    session.effect.told = True
    del session, chunk
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
