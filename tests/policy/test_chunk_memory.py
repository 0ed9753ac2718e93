"""Memory by whole chunks, as models that cache keys a chunk at a time read it."""

import pytest

from lipass.config import Config
from lipass.policy.chunk_memory import choose_chunks
from lipass.policy.plan import plan_chunk
from lipass.policy.trajectory import parse_trajectory

ROUND_AND_ROUND = "left-119"


def options(**changed):
    given = {"preset": "context", "context.memory_chunks": 2}
    return Config.resolve(None, given | {f"context.{k}": v for k, v in changed.items()})


def chosen(overlap, held=None, taken=(), history=None, **changed):
    held = range(len(overlap)) if held is None else held
    history = len(overlap) if history is None else history
    reasons = choose_chunks(overlap, held, set(taken), options(**changed).context, history)
    assert set(reasons) == set(range(len(overlap))) - set(taken)
    return [place for place, reason in sorted(reasons.items()) if reason.startswith("memory")]


def test_a_chunk_is_read_whole():
    assert chosen([0.1, 0.2, 0.9, 0.1, *[0.0] * 4]) == [0, 1, 2, 3]


def test_chunks_rank_by_the_mean_of_their_latents():
    one_latent, all_latents = [0.9, 0.0, 0.0, 0.0], [0.5] * 4
    assert chosen(one_latent + all_latents, memory_chunks=1) == [4, 5, 6, 7]


def test_of_equal_chunks_the_earliest_is_read():
    """A later visit of the same place has drifted further."""
    assert chosen([0.5] * 4 + [0.51] * 4 + [0.6] * 4, memory_chunks=2) == [
        0,
        1,
        2,
        3,
        8,
        9,
        10,
        11,
    ]


def test_several_visits_of_a_place_are_no_duplicates():
    assert chosen([0.8] * 12, memory_chunks=3) == [*range(12)]


def test_chunks_that_show_too_little_are_dropped_with_the_numbers():
    overlap = [0.2, 0.29, 0.1, 0.0]
    reasons = choose_chunks(overlap, range(4), set(), options().context, 4)
    assert set(reasons.values()) == {"dropped: overlap 0.29 < 0.30"}


def test_chunks_are_those_of_the_history_where_some_are_not_held():
    overlap = [0.4, 0.4, 0.9, 0.9]
    assert chosen(overlap, held=[2, 3, 4, 5], history=8, memory_chunks=1) == [2, 3]


def test_a_first_chunk_of_another_length_moves_no_other():
    assert chosen([0.9, *[0.4] * 4, *[0.6] * 4], memory_chunks=1) == [0]
    assert chosen([0.4, *[0.9] * 4, *[0.6] * 4], memory_chunks=1) == [1, 2, 3, 4]


def test_no_budget_reads_no_memory():
    assert chosen([0.9] * 8, memory_chunks=0) == []


def plan(history, held=None, **changed):
    poses = parse_trajectory(ROUND_AND_ROUND)
    return plan_chunk(
        options(**changed), poses=poses[:history], query=poses[history : history + 4],
        latents=None, own_context=None, stream="main", index=history // 4, held=held,
    ).context  # fmt: skip


def test_the_plan_reads_sink_window_and_whole_chunks_that_show_the_view():
    """Three degrees a latent: after 30 chunks the camera has come back to the first one."""
    made = plan(116, window_chunks_max=1, sink_latents=1)
    reasons = [frame.reason for frame in made.frames]
    assert [i for i, reason in enumerate(reasons) if reason == "window"] == [*range(112, 116)]
    memory = [i for i, reason in enumerate(reasons) if reason.startswith("memory")]
    assert len(memory) in (7, 8)
    assert {i // 4 for i in memory} <= {0, 1, 27}


def test_a_window_that_ends_inside_a_chunk_leaves_its_rest_a_candidate():
    """What sink and window read of a chunk is theirs; memory adds what is left of it."""
    assert chosen([0.9] * 8, taken=[0, 6, 7]) == [1, 2, 3, 4, 5]


def test_budgets_of_latents_and_of_chunks_are_apart():
    assert plan(116, memory_latents=0) == plan(116, memory_latents=9)
    latents = plan(116, memory_chunks=None, memory_latents=3)
    assert sum(frame.reason.startswith("memory") for frame in latents.frames) <= 3
    assert latents == plan(116, memory_chunks=None)


def test_a_negative_budget_is_refused():
    words = r"context\.memory_chunks must be None or >= 0.*-1.*use 8"
    with pytest.raises(ValueError, match=words):
        options(memory_chunks=-1)
