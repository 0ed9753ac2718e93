import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipass.config import Config
from lipass.policy.context import (
    ContextPlan,
    keep,
    plan_context,
    window_length,
)
from lipass.policy.latents import read_latents
from lipass.policy.plan import plan_chunk
from lipass.policy.trajectory import parse_trajectory
from lipass.policy.views import check_poses, score_points


def options(**changed):
    return Config.resolve("context", {f"context.{k}": v for k, v in changed.items()}).context


def plan(text, history, *, latents=None, **changed):
    chosen = options(**changed)
    poses = parse_trajectory(text)
    history_w2c, query = check_poses(poses[:history], poses[history : history + 4])
    return plan_context(score_points(history_w2c, query, chosen), latents, chosen)


def reasons(made):
    return [frame.reason for frame in made.frames]


def still(length):
    return torch.zeros(length, 2, 3, 3)


WAY_BACK = "left-31, right-32"


def test_everything_is_accounted_for_once_and_ascending():
    made = plan(WAY_BACK, 48)
    assert [frame.index for frame in made.frames] == list(range(48))
    assert made.indices == sorted(set(made.indices))
    for frame in made.frames:
        kept_words = frame.reason in ("sink", "window") or frame.reason.startswith("memory ")
        assert kept_words == frame.kept
        assert kept_words or frame.reason.startswith("dropped: ")


def test_sink_and_window_are_kept():
    made = plan(WAY_BACK, 40, sink_latents=2, window_chunks_max=2)
    assert [i for i, reason in enumerate(reasons(made)) if reason == "sink"] == [0, 1]
    assert [i for i, reason in enumerate(reasons(made)) if reason == "window"] == [*range(32, 40)]


def test_a_window_that_a_model_fixes_has_no_dynamics():
    made = plan(WAY_BACK, 40, window_latents=3, latents=still(40))
    assert [i for i, reason in enumerate(reasons(made)) if reason == "window"] == [37, 38, 39]
    assert (made.window_chunks, made.dynamics) == (None, None)


def test_history_inside_the_window_is_kept_whole():
    assert plan(WAY_BACK, 8).indices == list(range(8))


def test_memory_is_what_was_seen_from_there():
    """On the way back, chunk 12 looks where latents 11..14 looked."""
    made = plan(WAY_BACK, 48, window_chunks_max=1)
    memory = [f for f in made.frames if f.reason.startswith("memory")]
    assert memory
    assert all(7 <= frame.index <= 18 for frame in memory)
    assert all(frame.reason == f"memory {frame.overlap:.2f}" for frame in memory)


def test_memory_stays_within_its_budget():
    for budget in (0, 1, 2, 3):
        made = plan(WAY_BACK, 48, memory_latents=budget, window_chunks_max=1)
        assert sum(reason.startswith("memory") for reason in reasons(made)) <= budget


def test_full_budget_is_named_as_the_reason():
    made = plan("left-31, right-32", 48, memory_latents=1, gain_min=0.0, window_chunks_max=1)
    assert "dropped: 1 memory latents show more" in reasons(made)


def test_low_overlap_is_dropped_with_the_numbers():
    made = plan("left-63", 40)
    assert reasons(made)[5] == "dropped: overlap 0.00 < 0.30"
    assert made.frames[5].overlap == 0.0


def test_standing_still_keeps_no_duplicates():
    made = plan("left-2, " + "up-1, down-1, " * 30, 48, window_chunks_max=1)
    rest = [f for f in made.frames if f.reason not in ("sink", "window")]
    assert not any(frame.kept for frame in rest)
    assert sum("duplicates" in frame.reason for frame in rest) > 20


def test_equal_views_are_retrieved_once():
    """The camera looked at the same place three times; one look is enough."""
    made = plan("left-20, right-20, left-20, right-20, left-16", 88, window_chunks_max=1)
    memory = [f.index for f in made.frames if f.reason.startswith("memory")]
    turns = parse_trajectory("left-20, right-20, left-20, right-20, left-16")
    views = {tuple(turns[i].flatten().round(decimals=3).tolist()) for i in memory}
    assert len(views) == len(memory) <= 3


def test_the_sink_counts_as_memory_of_the_first_view():
    """Back at the start once more, a latent that shows what the sink shows is not retrieved."""
    made = plan("left-10, right-10, left-10, right-10", 36, window_chunks_max=1)
    assert reasons(made)[0] == "sink"
    assert reasons(made)[20].startswith("dropped")


def test_latents_of_an_earlier_visit_are_no_duplicates_of_the_window():
    """The window is generated on the way back; what was recorded there has drifted less."""
    back = plan(WAY_BACK, 40, window_chunks_max=1)
    assert sum(reason.startswith("memory") for reason in reasons(back)) == 3


def test_walking_on_needs_no_memory():
    """The window shows all that older latents show, and nothing was left."""
    on = plan("w-63", 40, window_chunks_max=1, sink_latents=0)
    assert on.indices == list(range(36, 40))


def best_cover(visibility, size, fixed):
    """Best mean coverage by `size` latents beside the fixed ones, by brute force."""
    points = visibility.transpose(0, 1).flatten(1)
    base = points[fixed].amax(0)
    from itertools import combinations

    return max(
        torch.maximum(base, points[list(chosen)].amax(0)).mean().item()
        for chosen in combinations(range(len(points)), size)
    )


def test_coverage_is_near_the_best_and_above_top_k():
    """Greedy coverage reaches 1 - 1/e of the best gain (submodular); top-k repeats itself."""
    chosen = options(memory_latents=2, window_chunks_max=1, gain_min=0.0)
    poses = parse_trajectory("left-18, right-13")
    history, query = check_poses(poses[:28], poses[28:32])
    query[2:] = history[[16, 17]]  # half of the new views look elsewhere
    visibility = score_points(history, query, chosen)
    made = plan_context(visibility, None, chosen)
    points = visibility.transpose(0, 1).flatten(1)
    memory = [f.index for f in made.frames if f.reason.startswith("memory")]
    base = points[0].mean().item()
    greedy = torch.maximum(points[0], points[memory].amax(0)).mean().item()
    best = best_cover(visibility[:, :24], 2, [0])
    top = points[:24].mean(1).topk(2).indices.tolist()
    top_k = torch.maximum(points[0], points[top].amax(0)).mean().item()
    assert greedy - base >= (1 - 2.72**-1) * (best - base)
    assert greedy > top_k


@pytest.mark.parametrize(
    ("dynamics", "chunks"),
    [(None, 4), (0.0, 4), (0.2, 4), (0.21, 3), (0.59, 3), (0.61, 2), (0.99, 2), (1.0, 1), (9, 1)],
)
def test_window_falls_in_steps_between_the_thresholds(dynamics, chunks):
    limits = options(window_chunks_max=4, dynamics_low=0.2, dynamics_high=1.0)
    assert window_length(dynamics, limits) == chunks


def test_window_of_two_lengths_switches_in_the_middle():
    limits = options(window_chunks_max=2, dynamics_low=0.0, dynamics_high=1.0)
    assert [window_length(d, limits) for d in (0.0, 0.4, 0.6, 1.0)] == [2, 2, 1, 1]
    fixed = options(window_chunks_min=3, window_chunks_max=3)
    assert [window_length(d, fixed) for d in (None, 0.5, 5.0)] == [3, 3, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 2), min_size=2, max_size=8), st.integers(1, 4), st.integers(0, 4))
def test_window_never_grows_with_dynamics(values, shortest, extra):
    limits = options(window_chunks_min=shortest, window_chunks_max=shortest + extra)
    lengths = [window_length(value, limits) for value in sorted(values)]
    assert lengths == sorted(lengths, reverse=True)
    assert all(shortest <= length <= shortest + extra for length in lengths)


def test_dynamics_compare_the_two_latest_chunks():
    latents = torch.zeros(12, 2, 3, 3)
    latents[4:8] = 1.0
    latents[8:12] = 3.0
    assert read_latents(latents, 12, 4).dynamics == pytest.approx(4.0)
    assert read_latents(latents.bfloat16(), 12, 4).dynamics == pytest.approx(4.0)
    assert read_latents(latents[:7], 7, 4).dynamics is None
    assert read_latents(None, 12, 4) == (None, None)


def test_dynamics_set_the_window():
    calm = plan(WAY_BACK, 40, latents=still(40))
    wild = still(40)
    wild[-4:] = 10.0
    assert (calm.window_chunks, calm.dynamics) == (3, 0.0)
    assert plan(WAY_BACK, 40, latents=wild).window_chunks == 1


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (still(39), "one entry a pose, got 39 for 40 poses; pass the history"),
        (still(40) * float("nan"), "finite, got a mean square of nan"),
        (
            still(40) + torch.tensor([3e38] * 36 + [-3e38] * 4)[:, None, None, None],
            "change of inf",
        ),
    ],
)
def test_wrong_latents_are_refused(latents, words):
    with pytest.raises(ValueError, match=words):
        plan(WAY_BACK, 40, latents=latents)


def test_policy_off_keeps_what_the_loop_reads():
    assert keep(3, None).indices == [0, 1, 2]
    own = keep(4, [3, 1])
    assert own.indices == [1, 3]
    assert own.frames[0].reason == "dropped: by the loop itself"


@pytest.mark.parametrize("own", [[4], [-1], [1, 1]])
def test_own_context_outside_the_history_is_refused(own):
    with pytest.raises(ValueError, match="indices of the 4 history latents, each once, got"):
        keep(4, own)


def test_plan_survives_plain_data():
    made = plan(WAY_BACK, 40, latents=still(40))
    assert ContextPlan.from_dict(made.to_dict()) == made


def test_plan_repeats_exactly():
    assert plan(WAY_BACK, 40) == plan(WAY_BACK, 40)


def test_sink_window_and_memory_are_chosen_among_what_is_held():
    """What a full cache has lost takes no place in the budget."""
    w2c = parse_trajectory(WAY_BACK)
    held = [*range(4, 24), *range(32, 40)]
    chosen = Config.resolve(None, {"preset": "context"})
    made = plan_chunk(
        chosen, poses=w2c[:40], query=w2c[40:44], latents=None, own_context=None,
        stream="main", index=10, held=held[::-1],
    ).context  # fmt: skip
    assert {i for i in range(40) if reasons(made)[i] == "dropped: the model does not hold it"} == {
        *range(40)
    }.difference(held)
    assert reasons(made)[4] == "sink"
    alone = plan_context(score_points(w2c[held], w2c[40:44], chosen.context), None, chosen.context)
    assert made.indices == [held[i] for i in alone.indices]
