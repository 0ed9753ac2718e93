"""The released gates for Matrix-Game 3.0, clip by clip (notes on the release, section 1.6)."""

import pytest
import torch

from lipass.policy.reference_matrixgame import frustum_similarity, gate_clip
from lipass.policy.trajectory import parse_trajectory

# Four iterations one way (57 + 3 * 40 frames), four back; 1.5 degrees or 0.1235 units a frame.
TURN = parse_trajectory("left-176, right-160", step_m=0.1235, step_deg=1.5)
WALK = parse_trajectory("w-176, s-160", step_m=0.1235, step_deg=1.5)


@pytest.mark.parametrize("path", [TURN, WALK], ids=["turn", "walk"])
def test_first_clip_has_no_memory(path):
    gate = gate_clip(path, 0)
    assert (gate.frames, gate.latents, gate.confidences, gate.reuse) == ((), (), (), False)


@pytest.mark.parametrize("clip", [1, 2, 3])
def test_turning_on_keeps_the_sink_only_and_computes_all_steps(clip):
    gate = gate_clip(TURN, clip)
    assert gate.latents == (1,)
    assert not gate.reuse
    assert all(confidence < 0.45 for confidence in gate.confidences)


@pytest.mark.parametrize("clip", [4, 5, 6, 7])
def test_turning_back_keeps_five_and_reuses(clip):
    gate = gate_clip(TURN, clip)
    assert len(gate.latents) == 5
    assert gate.reuse


@pytest.mark.parametrize("clip", range(1, 8))
def test_walking_keeps_five_and_reuses_even_while_exploring(clip):
    gate = gate_clip(WALK, clip)
    assert len(gate.latents) == 5
    assert gate.reuse


@pytest.mark.parametrize("clip", range(1, 8))
def test_last_pick_is_overwritten_by_the_sink(clip):
    gate = gate_clip(WALK, clip)
    assert gate.frames[-1] == 4
    assert gate.latents[-1] == 1
    assert len(gate.confidences) == 5


def test_duplicates_are_kept():
    latents = gate_clip(WALK, 7).latents
    assert len(set(latents)) < len(latents)


def test_picks_come_from_before_the_clip_and_its_conditioning():
    for clip in range(1, 8):
        end = 57 + 40 * clip
        assert all(1 <= frame < end - 56 for frame in gate_clip(WALK, clip).frames)


def test_identical_views_score_four_fifths():
    """The nearest and the farthest depth plane fail a strict comparison."""
    assert frustum_similarity(torch.eye(4).double(), torch.eye(4).double()[None]) == 0.8


def test_short_trajectory_is_refused():
    with pytest.raises(ValueError, match="end of clip 7, got 100 of 337 frames; extend"):
        gate_clip(WALK[:100], 7)
