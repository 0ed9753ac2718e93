"""Which chunk a full cache gives up."""

import pytest
import torch

import lipass
from lipass.config import Config
from lipass.policy.holding import least_needed
from lipass.policy.trajectory import parse_trajectory

LENGTH = 4


def options(**changed):
    named = {f"context.{name}": value for name, value in changed.items()}
    return Config.resolve(
        None, {"preset": "context", "context.window_chunks_max": 1, **named}
    ).context


def test_a_place_that_nothing_else_shows_outlives_one_that_was_seen_twice():
    # Chunks look ahead, left, behind, and ahead again, then walk on.
    views = [parse_trajectory("left-36", step_deg=10.0)[i] for i in (0, 9, 18, 0, 27)]
    w2c = torch.stack(views).repeat_interleave(LENGTH, 0)
    # 0 and 3 show the same; 0 is the sink, and 4 the window.
    assert least_needed(w2c, options()) == 3 * LENGTH
    # Without a sink either would do, and the later one has drifted more.
    assert least_needed(w2c, options(sink_latents=0)) == 3 * LENGTH


def test_sink_and_window_stay_where_all_views_are_equal():
    w2c = torch.eye(4).repeat(6 * LENGTH, 1, 1)
    assert least_needed(w2c, options()) == 4 * LENGTH
    assert least_needed(w2c, options(window_chunks_max=3, sink_latents=5)) == 2 * LENGTH


def test_a_cache_that_is_kept_by_it_still_shows_a_whole_turn():
    w2c = parse_trajectory("left-143", step_deg=10.0)
    held = list(range(9 * LENGTH))
    for start in range(9 * LENGTH, len(w2c), LENGTH):
        held += range(start, start + LENGTH)
        first = least_needed(w2c[held], options())
        del held[first : first + LENGTH]
    assert len(held) == 9 * LENGTH
    # The first turn is 36 latents; all later ones repeat it.
    assert sum(index < 36 for index in held) >= 7 * LENGTH


@pytest.mark.parametrize(
    ("latents", "said"), [(6, "whole chunks of 4 latents, got 6"), (8, "more than the sink")]
)
def test_a_cache_of_broken_chunks_or_none_to_spare_is_refused(latents, said):
    with pytest.raises(ValueError, match=said):
        least_needed(torch.eye(4).repeat(latents, 1, 1), options())


def test_a_session_reads_cameras_in_its_convention():
    w2c = parse_trajectory("left-15,right-16")
    with lipass.Session(preset="context", **{"context.window_chunks_max": 1}) as session:
        expected = session.least_needed(w2c)
    with lipass.Session(
        preset="context", convention="c2w-opencv", **{"context.window_chunks_max": 1}
    ) as session:
        assert session.least_needed(torch.linalg.inv(w2c)) == expected


def test_a_session_that_does_not_choose_says_so():
    with (
        lipass.Session(preset="exact") as session,
        pytest.raises(lipass.LipassError, match="'exact' has not; use 'context' or 'all'"),
    ):
        session.least_needed(torch.eye(4).repeat(16, 1, 1))
