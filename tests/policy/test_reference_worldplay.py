"""The released gates for HY-WorldPlay, chunk by chunk (notes on the release, section 1.4)."""

import pytest
import torch

from lipass.policy.reference_worldplay import gate_chunk, view_similarity
from lipass.policy.trajectory import parse_trajectory

ALL = {"context_latents": 12, "temporal_latents": 4}
CACHE = {"context_latents": 20, "temporal_latents": 12, "context_threshold": 0.0}


def gates(text, settings):
    poses = parse_trajectory(text).double()
    return {
        c: gate_chunk(poses[: 4 * c], poses[4 * c : 4 * c + 4], **settings) for c in range(1, 16)
    }


@pytest.mark.parametrize(
    ("path", "settings", "chunks"),
    [
        ("left-31, right-32", ALL, range(8, 16)),
        ("w-31, s-32", ALL, range(3, 16)),
        ("w-63", ALL, range(3, 16)),
        ("left-31, right-32", CACHE, range(9, 16)),
        ("w-31, s-32", CACHE, range(8, 16)),
    ],
    ids=["turn all", "walk all", "forward all", "turn cache", "walk cache"],
)
def test_steps_are_reused_in_the_chunks_of_the_table(path, settings, chunks):
    assert [c for c, gate in gates(path, settings).items() if gate.reuse] == list(chunks)


def test_context_sizes_of_the_turn():
    sizes = {c: len(gate.indices) for c, gate in gates("left-31, right-32", ALL).items()}
    assert sizes == {1: 4, 2: 8, **{c: 8 for c in range(3, 8)}, **{c: 12 for c in range(8, 16)}}


def test_context_sizes_of_the_walk():
    sizes = {c: len(gate.indices) for c, gate in gates("w-31, s-32", ALL).items()}
    assert sizes == {1: 4, 2: 8, **{c: 12 for c in range(3, 16)}}


def test_unfiltered_context_fills_up_to_twenty():
    sizes = [len(gate.indices) for gate in gates("left-31, right-32", CACHE).values()]
    assert sizes == [4, 8, 12, 16] + [20] * 11


@pytest.mark.parametrize(
    ("path", "settings", "chunk", "score"),
    [
        ("left-31, right-32", ALL, 5, 0.58),
        ("w-31, s-32", ALL, 5, 0.777),
        ("w-31, s-32", CACHE, 8, 0.709),
        ("left-31, right-32", ALL, 15, 0.764),
    ],
)
def test_scores_of_the_notes(path, settings, chunk, score):
    """Within three standard errors of the release's 2,500 random points."""
    assert gates(path, settings)[chunk].best == pytest.approx(score, abs=0.027)


def test_sink_scores_higher_than_the_candidates_but_is_none():
    poses = parse_trajectory("left-31, right-32").double()
    gate = gate_chunk(poses[:60], poses[60:64], **ALL)
    sink = view_similarity(poses[60:64], poses[[0, 2]], 60.0, 35.0, 8.0).mean()
    assert 0 not in gate.scores
    assert sink > 0.9 > gate.best


def test_candidates_are_clips_between_sink_and_window():
    gate = gates("left-31, right-32", ALL)[8]
    assert list(gate.scores) == [4, 8, 12, 16, 20, 24]
    assert gate.retrieved == (24,)
    assert gate.indices == (0, 1, 2, 3, 24, 25, 26, 27, 28, 29, 30, 31)


def test_identical_views_score_one_and_opposite_ones_zero():
    poses = parse_trajectory("left-60").double()
    scores = view_similarity(poses[:1], poses[[0, 60]], 60.0, 35.0, 8.0)
    assert scores.tolist() == [[1.0, 0.0]]


def test_gates_do_not_depend_on_the_seed():
    torch.manual_seed(1)
    first = gates("w-31, s-32", CACHE)[8]
    torch.manual_seed(2)
    assert gates("w-31, s-32", CACHE)[8] == first
