import pytest
import torch

from lipass.config import Config
from lipass.policy.revisit import decide_revisit
from lipass.policy.trajectory import parse_trajectory
from lipass.policy.views import check_poses, score_points


def decisions(text, *, first=4, **changed):
    """Decide for each whole chunk after the first `first` latents of a path."""
    chosen = Config.resolve("cache", {f"steps.{k}": v for k, v in changed.items()}).steps
    poses = parse_trajectory(text)
    made = {}
    for start in range(first, len(poses) - 3, 4):
        history, query = check_poses(poses[:start], poses[start : start + 4])
        overlap = score_points(history, query, chosen).mean(-1)
        made[start // 4] = decide_revisit(overlap, chosen)
    return made


def revisits(text, **changed):
    return [chunk for chunk, made in decisions(text, **changed).items() if made.allowed]


@pytest.mark.parametrize(
    ("path", "chunks"),
    [
        ("left-31, right-32", range(9, 16)),
        ("right-31, left-32", range(9, 16)),
        ("w-31, s-32", range(9, 16)),
        ("a-31, d-32", range(9, 16)),
        ("up-11, down-12, up-8", range(4, 8)),
        ("left-123", (29, 30)),  # a full turn reaches the first view again in latent 120
        ("w-20, right-60, w-20, right-60, w-3", (39, 40)),  # there and back to the start
    ],
    ids=["turn back", "mirror", "walk back", "strafe back", "nod", "full turn", "closed loop"],
)
def test_return_is_a_revisit_and_the_way_out_is_not(path, chunks):
    assert revisits(path) == list(chunks)


@pytest.mark.parametrize(
    "path",
    [
        "w-63",
        "s-63",
        "a-63",
        "left-63",
        "left-31, w-32",
        "w-16, left-30, w-17",
        "w-4, left-1, " * 12 + "w-3",  # along an arc
        "w-2, left-1, w-2, right-1, " * 10 + "w-3",  # forward, looking about a little
    ],
)
def test_exploring_is_never_a_revisit(path):
    assert revisits(path) == []


def test_slow_walk_forward_is_never_a_revisit():
    """The released gate fires on any motion that is slow against the field of view."""
    poses = parse_trajectory("w-63", step_m=0.01)
    chosen = Config.resolve("cache").steps
    for start in range(4, 64, 4):
        history, query = check_poses(poses[:start], poses[start : start + 4])
        made = decide_revisit(score_points(history, query, chosen).mean(-1), chosen)
        assert not made.allowed
        assert made.score == 0.0


def test_standing_still_is_not_a_revisit():
    poses = torch.eye(4).expand(40, 4, 4)
    chosen = Config.resolve("cache").steps
    history, query = check_poses(poses[:36], poses[36:])
    made = decide_revisit(score_points(history, query, chosen).mean(-1), chosen)
    assert not made.allowed
    assert made.reason == "exploring: no earlier view was left and reached again"


def test_trembling_hands_are_not_a_revisit():
    assert revisits("left-1, right-1, " * 30 + "left-3") == []


def test_standing_still_after_a_return_stays_a_revisit():
    poses = parse_trajectory("left-15, right-15")
    poses = torch.cat([poses, poses[-1:].expand(9, 4, 4)])
    chosen = Config.resolve("cache").steps
    history, query = check_poses(poses[:36], poses[36:40])
    assert decide_revisit(score_points(history, query, chosen).mean(-1), chosen).allowed


def test_returning_to_the_first_view_counts_and_names_it():
    last = decisions("left-31, right-32")[15]
    assert last.allowed
    assert last.latent <= 3
    assert last.score > 0.95


def test_walking_on_after_a_glance_aside_soon_explores_again():
    made = decisions("w-10, left-7, right-7, w-23")
    assert made[5].allowed  # the way back of the glance
    assert [chunk for chunk in made if chunk > 6 and made[chunk].allowed] == []
    assert "the latest latent shows more" in made[7].reason


def test_reason_carries_the_numbers():
    made = decisions("left-31, right-32")
    assert made[8].reason == f"exploring: revisit score {made[8].score:.2f} < 0.80"
    assert made[12].reason == f"revisits latent {made[12].latent}, score 1.00"


def test_threshold_zero_reuses_wherever_there_is_a_history():
    assert revisits("w-15", overlap_min=0) == [1, 2, 3]
    empty = decide_revisit(torch.empty(4, 0), Config.resolve("cache").steps)
    assert not empty.allowed
    assert empty.reason == "no history"


def test_departure_decides_how_soon_the_return_counts():
    early = revisits("left-31, right-32", departure_min=0.02)
    late = revisits("left-31, right-32", departure_min=0.5)
    assert early[0] <= 9 < late[0]


def test_single_latent_of_history():
    chosen = Config.resolve("cache").steps
    assert not decide_revisit(torch.ones(4, 1), chosen).allowed
