"""What a session keeps of a stream goes when it is forgotten, and nothing of another one does."""

import pytest
import torch

from lipass.errors import LipassError
from lipass.kernels import registry
from lipass.kernels.merge.running import MergeRule
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import current_report, reset_report
from lipass.runtime.written_slots import Placed
from lipass.session import Session

WAY_BACK = parse_trajectory("left-15, right-16")
TEXT = [torch.ones(1, 6, 8)]
RULE = MergeRule(0.8, None, 0, 6, 12)
KEYS = torch.randn(1, 2, 12, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_report():
    reset_report()


def merged(session, stream):
    with session.histories.answering(stream):
        return registry.answer_of("merge_history")(KEYS, KEYS, KEYS, 0.3, RULE, "blocks.0")


def go(session, stream, chunks=range(2)):
    """Generate chunks that leave something of the stream wherever something is kept."""
    for index in chunks:
        start = 4 * index
        with session.chunk(
            poses=WAY_BACK[:start] if start else None,
            query=WAY_BACK[start : start + 4],
            stream=stream,
        ) as chunk:
            with session.prompts.scores.answering(chunk):
                if (ask := registry.answer_of("steering_bias")) is not None:
                    ask(KEYS, (12,), ("text",), 1, 1)
            merged(session, stream)
            with session.stream("cond"):
                merged(session, stream)
        session.written.add(stream, index, Placed(8, ((0, 4),), 4, False), start)


def names(kept):
    """List all that names something in what parts of a session keep."""
    if isinstance(kept, dict):
        return {name for pair in kept.items() for one in pair for name in names(one)}
    if isinstance(kept, list | tuple):
        return {name for one in kept for name in names(one)}
    return {kept} if isinstance(kept, str) else set()


def kept(session):
    parts = {name: names(part) for name, part in session.snapshot(records=False).parts.items()}
    parts["rows"] = names(list(session.prompts.scores._rows))
    parts["answers"] = names(list(session.histories._answers))
    return {
        part: found
        for part, known in parts.items()
        if (found := {name for name in known if name.partition("/")[0] in ("a", "ab", "b")})
    }


@pytest.fixture
def session():
    opened = Session(preset="all")
    opened.effect.told = True  # what it spared is not asked here
    for stream in ("a", "ab", "b"):
        opened.steer(TEXT, 4, "two-prompt", stream=stream)
        go(opened, stream)
    return opened


def test_nothing_of_a_stream_that_is_forgotten_stays(session):
    before = kept(session)
    assert before.keys() == {
        "turns", "given", "histories", "written", "prompts", "rows", "answers",
    }  # fmt: skip
    session.forget("a")
    assert kept(session) == {
        part: {name for name in known if name.partition("/")[0] != "a"}
        for part, known in before.items()
    }
    assert all({"ab", "b"} <= known for known in kept(session).values())
    for stream in ("ab", "b"):
        session.forget(stream)
    assert kept(session) == {}
    assert len(current_report().chunks) == 6


def test_nothing_of_it_stays_in_a_session_that_was_resumed(session):
    resumed = Session.resume(session.snapshot())  # what was merged waits to be asked for
    resumed.forget("a")
    assert all("a" not in known for known in kept(resumed).values())


def test_what_others_have_merged_is_not_merged_anew(session):
    first = merged(session, "b")
    session.forget("a")
    assert merged(session, "b") is first
    assert session.histories.anew == 6
    merged(session, "a")
    assert session.histories.anew == 7


def test_a_name_that_was_forgotten_is_as_good_as_new(session):
    session.forget("a")
    with session.chunk(query=WAY_BACK[:4], stream="a") as chunk:
        assert (chunk.index, chunk.plan.history_latents) == (0, 0)
        with pytest.raises(LipassError, match="got none for stream 'a'"):
            _ = chunk.text
    assert session.chunk(poses=WAY_BACK[:8], query=WAY_BACK[8:12], stream="b").index == 2


def test_a_stream_with_an_open_chunk_is_not_forgotten(session):
    before = kept(session)
    with session.chunk(poses=WAY_BACK[:8], query=WAY_BACK[8:12], stream="a") as chunk:
        with pytest.raises(LipassError, match=r"between two chunks, got an open one, 2 of 'a'; l"):
            session.forget("a")
        session.forget("b")
        chunk.close()
    assert kept(session)["turns"] == before["turns"] - {"b"}
    session.forget("a")


def test_of_what_nobody_knows_there_is_nothing_to_drop(session):
    before = kept(session)
    session.forget("c")
    assert kept(session) == before
    with pytest.raises(TypeError, match="a stream must have a name, got 3"):
        session.forget(3)
    with pytest.raises(ValueError, match="got ''"):
        session.forget("")
    session.close()
    session.forget("a")


def test_a_replay_that_forgets_a_stream_goes_on_with_the_next_of_its_name():
    def roll_out(session):
        contexts = []
        for chunks in (3, 2):
            for index in range(chunks):
                start = 4 * index
                with session.chunk(
                    poses=WAY_BACK[:start] if start else None, query=WAY_BACK[start : start + 4]
                ) as chunk:
                    contexts.append((chunk.index, chunk.context))
            session.forget("main")
        return contexts

    session = Session(preset="all")
    recorded = roll_out(session)
    plans = session.snapshot().plans
    with Session.replay(plans) as session:
        assert roll_out(session) == recorded
    with Session.replay(plans) as session:
        for start in (0, 0):  # given up behind its first chunk
            with session.chunk(query=WAY_BACK[start : start + 4]) as chunk:
                assert chunk.index == 0
            session.forget("main")
        with pytest.raises(LipassError, match="got one more for 'main'"):
            session.chunk()
