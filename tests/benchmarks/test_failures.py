"""What the search for failures says of a frame, and which walks it shows."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import failures
from lipass.policy.trajectory import parse_trajectory
from lipass.quality import Rollout, Scene, Space, measure
from lipass.quality.results import Entry
from lipass.quality.subject import Case

# Turned by 12 degrees a frame, frames 0 and 5 share nothing of a view of 60 degrees.
W2C = parse_trajectory("left-7, right-8", step_deg=12.0)
SCENE = Scene(W2C, 12, 4, None, Space(W2C, torch.full((16, 8, 8), 3.0), 60.0, 60.0))


def run(context, steps=4, density=1.0, reason="a duplicate"):
    chunk = SimpleNamespace(start=12, context=context, steps_computed=steps)
    frames = [{"index": i, "reason": reason} for i in range(12)]
    return SimpleNamespace(
        rollout=SimpleNamespace(chunks=[chunk]),
        plans=[{"context": {"frames": frames}}],
        density=density,
    )


def said(scene, mine, dense, frame):
    return failures.why(failures.made_of(scene, mine, dense, frame))


def test_a_frame_that_memory_lacks_names_what_was_left_out_and_why():
    told = said(SCENE, run([6, 7]), run(list(range(12))), 14)
    assert told.startswith("Memory lacks it: what was read shows 0% of the frame")
    assert "Latent 0, which shows 100%, was left out (a duplicate)." in told


def test_a_frame_that_memory_has_is_lost_elsewhere():
    whole = run(list(range(12)))
    assert said(SCENE, run([0, 11]), whole, 14).endswith("from 2 latents in place of 12.")
    assert said(SCENE, run([0, 11], density=0.5), whole, 14).startswith("Blocks lack")
    assert "2 of 4 steps computed" in said(SCENE, run(list(range(12)), 2), whole, 14)


def test_a_frame_that_the_dense_loop_lacks_is_not_the_fault_of_the_preset():
    assert said(SCENE, run([0]), run([6, 7]), 14).startswith("The dense loop lacks it")


def test_a_frame_that_nobody_saw_is_imagined():
    behind = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])) @ W2C[:4]
    far = torch.cat([W2C[:12], behind])
    scene = Scene(far, 12, 4, None, Space(far, torch.full((16, 8, 8), 3.0), 60.0, 60.0))
    assert said(scene, run([0]), run([0, 1]), 12).startswith("It is imagined: no more than 0%")


@pytest.fixture
def explained(pictures_of_walk):
    """Return what explains a walk whose frames a preset has changed by so much each."""
    w2c = parse_trajectory("left-11, right-12", step_deg=4.0)
    space = Space(w2c, torch.full((24, 16, 16), 3.0), 60.0, 60.0)
    scene = Scene(w2c, 4, 4, pictures_of_walk, space)
    case = Case("loop", "free", 1)

    def explain(changed):
        films = {"off": pictures_of_walk, "all": pictures_of_walk.clone()}
        for frame, by in changed.items():
            films["all"][frame] += by

        def made(method, case):
            chunks = [SimpleNamespace(start=start, context=[0, 1], steps_computed=4)
                      for start in range(4, 24, 4)]  # fmt: skip
            rollout = SimpleNamespace(chunks=chunks, latents=films[method])
            return SimpleNamespace(rollout=rollout, plans=[], density=1.0)

        codec = SimpleNamespace(decode=lambda latents: latents)
        subject = SimpleNamespace(scene=lambda case: scene, run=made, codec=codec)
        dense = Entry("off", case, measure(Rollout(films["off"]), scene))
        values = measure(Rollout(films["all"]), scene, Rollout(films["off"]))
        entry = Entry("all", case, values, "changed")
        row, picture = failures.explain(subject, entry, [dense, entry])
        document = {
            "environment": {"commit": "abc"}, "rooms": [1], "trajectories": ["loop"],
            "regimes": ["free"], "rollouts": 2, "table": [], "shown": [row],
        }  # fmt: skip
        return row, json.loads(json.dumps(document, allow_nan=False)), picture

    return explain


@pytest.fixture
def pictures_of_walk():
    return torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5


def test_frame_and_reason_are_those_of_the_worst_chunk(explained):
    whole = dict.fromkeys(range(16, 20), 0.2)
    row, document, _ = explained({9: 0.3, **whole, 18: 0.21})  # frame 9 alone is furthest
    assert (row["frame"], row["chunk_start"]) == (18, 16)
    assert "frame 18: 13.9 dB in this chunk" in failures.page(document)


def test_a_walk_without_numbers_is_shown_from_where_they_end(explained):
    row, document, picture = explained({9: 0.3, 14: float("nan"), 15: float("nan")})
    assert (row["frame"], row["chunk_start"]) == (14, 12)
    assert "frame 14: from here on values are no numbers" in failures.page(document)
    assert picture.size[0] > 2 * picture.size[1]


@pytest.fixture
def entries():
    worse = iter(range(1000))
    return [
        Entry(preset, Case(walk, regime, room), {"psnr_vs_off_worst_db": 20.0 + next(worse) / 10})
        for preset in failures.PRESETS
        for walk in ("loop", *failures.HARD)
        for regime in failures.REGIMES
        for room in (1, 2)
    ]


def test_shown_are_the_worst_of_each_preset_and_of_all_on_each_hard_walk(entries):
    shown = [(one.method, one.case.trajectory) for one in failures.worst(entries)]
    assert {preset for preset, _ in shown} == set(failures.PRESETS)
    assert {("all", walk) for walk in failures.HARD} <= set(shown)
    assert len(shown) == len(set(shown))


def test_a_broken_walk_is_the_worst_of_its_preset_and_the_table_says_so(entries):
    spoilt = next(i for i, one in enumerate(entries) if one.method == "all")
    entries[spoilt] = entries[spoilt]._replace(values={"psnr_vs_off_worst_db": None})
    shown = [one for one in failures.worst(entries) if one.method == "all"]
    assert shown[0] is entries[spoilt]
    rows = failures.table(entries)
    assert next(row["all"] for row in rows if row["trajectory"] == "loop") is None


def test_table_has_the_worst_of_all_rooms(entries):
    rows = failures.table([one for one in entries if one.case.trajectory == "loop"])
    assert [row["regime"] for row in rows] == list(failures.REGIMES)
    assert rows[0]["context"] == 20.0
    assert rows[1]["context"] == 20.2
