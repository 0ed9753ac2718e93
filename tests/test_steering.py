import pytest
import torch

import lipass
from lipass.errors import LipassError
from lipass.policy.plan import ChunkPlan
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import current_report, reset_report

DAY, NIGHT, FOG = (
    [torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(seed))] for seed in range(3)
)
WAY_BACK = parse_trajectory("left-15, right-32")
SIGMAS = (1.0, 0.9375, 0.8333, 0.625, 0.0)


@pytest.fixture(autouse=True)
def _fresh_report():
    reset_report()


def chunk_of(session, index, **given):
    start = 4 * index
    return session.chunk(
        poses=WAY_BACK[:start] if start else None, query=WAY_BACK[start : start + 4], **given
    )


def run(session, chunks, said=None):
    """Generate chunks, and say something in front of some; gives texts and plans."""
    texts, plans = [], []
    for index in range(chunks):
        for change in (said or {}).get(index, ()):
            session.steer(*change)
        with chunk_of(session, index) as chunk:
            texts.append(chunk.text[0])
            list(chunk.steps(SIGMAS))
        plans.append(chunk.plan)
    return texts, plans


def test_the_prompt_walks_from_one_text_to_the_other():
    session = lipass.Session(preset="off")
    texts, plans = run(session, 8, {0: [(DAY,)], 2: [(NIGHT, 4, "lerp")]})
    for text, weight in zip(texts, (0, 0, 0.25, 0.5, 0.75, 1, 1, 1), strict=True):
        torch.testing.assert_close(text, torch.lerp(DAY[0], NIGHT[0], weight))
    assert texts[1] is DAY[0]
    assert texts[6] is NIGHT[0]
    assert [plan.steering.place for plan in plans] == [0, 0, 1, 2, 3, 4, 0, 0]
    assert plans[3].steering.said() == "prompt 1: lerp, chunk 2 of 4, weight 0.50"


@pytest.mark.parametrize("policy", ["hard", "recache", "flush"])
def test_at_once_is_at_once(policy):
    session = lipass.Session(preset="off")
    texts, _ = run(session, 4, {0: [(DAY,)], 2: [(NIGHT, 4, policy)]})
    assert [text is NIGHT[0] for text in texts] == [False, False, True, True]


def test_the_same_prompt_again_changes_nothing():
    session = lipass.Session(preset="off")
    texts, _ = run(session, 5, {0: [(DAY,)], 1: [(DAY, 4, "slerp")]})
    assert all(text is DAY[0] for text in texts)


def test_a_change_within_a_change_goes_on_from_where_it_is():
    session = lipass.Session(preset="off")
    texts, _ = run(session, 6, {0: [(DAY,)], 1: [(NIGHT, 4, "lerp")], 3: [(FOG, 2, "lerp")]})
    half = torch.lerp(DAY[0], NIGHT[0], 0.5)
    torch.testing.assert_close(texts[2], half)
    torch.testing.assert_close(texts[3], torch.lerp(half, FOG[0], 0.5))
    assert texts[4] is FOG[0]


def test_a_change_said_within_an_open_chunk_starts_from_what_that_shows():
    session = lipass.Session(preset="off")
    run(session, 1, {0: [(DAY,)]})
    session.steer(NIGHT, 4, "lerp")
    with chunk_of(session, 1) as chunk:
        session.steer(FOG, 2, "lerp")
        shown = torch.lerp(DAY[0], NIGHT[0], 0.25)
        torch.testing.assert_close(chunk.text[0], shown)
    with chunk_of(session, 2) as chunk:
        torch.testing.assert_close(chunk.text[0], torch.lerp(shown, FOG[0], 0.5))
    with chunk_of(session, 3) as chunk:
        assert chunk.text[0] is FOG[0]


@pytest.mark.parametrize("when", ["before its block", "in its block"])
def test_a_change_said_behind_the_plan_of_a_chunk_begins_with_the_next(when):
    """Nothing of it is lost: it ramps, flushes and encodes anew as if said behind the chunk."""
    for policy in ("lerp", "flush", "recache"):
        steering = lipass.Steering(policy=policy, over_chunks=2, newest_latents=1)
        session = lipass.Session(preset="off")
        run(session, 2, {0: [(DAY,)]})
        chunk, plans = chunk_of(session, 2), []
        if when == "before its block":
            session.steer(NIGHT, policy=steering)
        with chunk:
            if when == "in its block":
                session.steer(NIGHT, policy=steering)
            assert chunk.text is DAY
        for index in range(3, 6):
            with chunk_of(session, index) as chunk:
                plans.append(chunk.plan.steering)
        assert [blend.place for blend in plans] == [1, 2, 0]
        assert plans[0].since == 12
        assert plans[0].flush == ((1, 11) if policy == "flush" else None)
        assert plans[0].recache == (tuple(range(12)) if policy == "recache" else ())
        assert plans[0].weight == (0.5 if policy == "lerp" else 1.0)


def test_what_was_made_while_another_prompt_was_said_is_remembered_as_it_was():
    session = lipass.Session(preset="off")
    run(session, 1, {0: [(DAY,)]})
    session.steer(NIGHT, 1, "hard")
    with chunk_of(session, 1):
        session.steer(FOG, 1, "hard")
    with chunk_of(session, 2) as chunk:
        assert [text[0] is made[0] for (text, _), made in
                zip(chunk.memory, (DAY, NIGHT), strict=True)] == [True, True]  # fmt: skip
        assert chunk.text[0] is FOG[0]


def test_a_chunk_that_is_tried_again_after_a_change_was_said_in_it_takes_part():
    session = lipass.Session(preset="off")
    run(session, 1, {0: [(DAY,)]})
    failed = chunk_of(session, 1)
    failed.__enter__()
    session.steer(NIGHT, 4, "lerp")
    failed.close()
    places = []
    for index in (1, 2, 3, 4, 5):
        with chunk_of(session, index) as chunk:
            places.append(chunk.plan.steering.place)
    assert places == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("copied", [False, True])
def test_an_old_prompt_said_again_is_that_prompt(copied):
    """Also where the session was forked, or the loop encodes each text anew."""
    session = lipass.Session(preset="all", chunk_latents=4)
    run(session, 3, {0: [(DAY,)], 2: [(NIGHT, 1, "hard")]})
    forked = session.fork()
    plans = []
    for own in (session, forked):
        own.steer([DAY[0].clone()] if copied else DAY, 1, "hard")
        own.steer([DAY[0].clone()], 1, "hard")
        for index in range(3, 8):  # back to where the day was
            with chunk_of(own, index) as chunk:
                list(chunk.steps(SIGMAS))
        plans.append(chunk.plan)
    assert plans[0] == plans[1]
    assert plans[0].revisit.allowed


def test_what_was_said_and_never_shown_is_no_place_to_start_from():
    session = lipass.Session(preset="off")
    said = {0: [(DAY,)], 1: [(NIGHT, 4, "lerp"), (FOG, 2, "lerp")]}
    texts, _ = run(session, 3, said)
    torch.testing.assert_close(texts[1], torch.lerp(DAY[0], FOG[0], 0.5))


def test_a_chunk_that_failed_is_no_chunk_of_the_change():
    session = lipass.Session(preset="off")
    session.steer(DAY)
    run(session, 1)
    session.steer(NIGHT, 4, "lerp")
    for _ in range(2):
        failed = chunk_of(session, 1)
        with pytest.raises(KeyError), failed:
            raise KeyError
        assert failed.plan.steering.place == 1
    with chunk_of(session, 1) as chunk:
        assert chunk.plan.steering.place == 1


def test_the_text_is_one_object_as_long_as_it_is_the_same():
    session = lipass.Session(preset="off")
    session.steer(DAY)
    run(session, 1)
    session.steer(NIGHT, 2, "lerp")
    with chunk_of(session, 1) as chunk:
        assert chunk.text[0] is chunk.text[0]


def test_streams_have_prompts_of_their_own():
    session = lipass.Session(preset="off")
    session.steer(DAY, stream="a")
    session.steer(NIGHT, stream="b")
    for name, text in (("a", DAY), ("b", NIGHT)):
        with chunk_of(session, 0, stream=name) as chunk:
            assert chunk.text is text


def test_a_replay_shows_what_was_recorded():
    said = {0: [(DAY,)], 1: [(NIGHT, 4, lipass.Steering(curve=[0.1, 0.2, 0.9, 1.0]))]}
    said[3] = [(FOG, 3, "slerp")]
    recorded, plans = run(lipass.Session(preset="off"), 7, said)
    logged = [ChunkPlan.from_json(plan.to_json()) for plan in plans]
    assert logged == plans
    replayed = lipass.Session.replay(logged)
    for text in (DAY, NIGHT, FOG):
        replayed.steer(text)
    again, _ = run(replayed, 7)
    for one, other in zip(recorded, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_replay_without_the_texts_says_which_is_missing():
    _, plans = run(lipass.Session(preset="off"), 2, {0: [(DAY,)], 1: [(NIGHT,)]})
    replayed = lipass.Session.replay(plans)
    replayed.steer(DAY)
    run(replayed, 1)
    with chunk_of(replayed, 1) as chunk, pytest.raises(LipassError, match="got 1 of them for pro"):
        _ = chunk.text


def test_memory_is_encoded_with_the_text_that_it_was_made_under():
    session = lipass.Session(preset="off")
    run(session, 4, {0: [(DAY,)], 1: [(NIGHT, 2, "lerp")], 3: [(DAY, 1, "hard")]})
    with chunk_of(session, 4) as chunk:
        shown = [(text, latents) for text, latents in chunk.memory]
    assert [latents for _, latents in shown] == [
        list(range(8)), list(range(8, 12)), list(range(12, 16)),
    ]  # fmt: skip
    assert [text for text, _ in shown] == [DAY, NIGHT, DAY]


def test_recache_encodes_the_latest_latents_under_the_new_prompt_and_keeps_that():
    session = lipass.Session(preset="off")
    run(session, 4, {0: [(DAY,)]})
    session.steer(NIGHT, policy=lipass.Steering(policy="recache", recache_latents=8))
    with chunk_of(session, 4) as chunk:
        assert chunk.recache == tuple(range(8, 16))
        assert [latents[0] for _, latents in chunk.memory] == [0, 8]
    with chunk_of(session, 5) as chunk:
        assert chunk.recache == ()
        assert [latents[0] for _, latents in chunk.memory] == [0, 8]


def test_flush_gives_old_history_up_for_good_but_for_sink_and_newest():
    session = lipass.Session(preset="off")
    run(session, 4, {0: [(DAY,)]})
    session.steer(NIGHT, policy="flush")
    with chunk_of(session, 4, held=range(2, 16)) as chunk:
        assert chunk.context == [12, 13, 14, 15]
        assert chunk.given_up == list(range(2, 12))
    with chunk_of(session, 5) as chunk:
        assert chunk.context == [0, *range(12, 20)]
        assert chunk.given_up == []
        assert "flushed" in chunk.plan.context.frames[5].reason


def test_the_window_grows_after_a_change():
    session = lipass.Session(preset="off")
    run(session, 4, {0: [(DAY,)]})
    session.steer(NIGHT, policy=lipass.Steering(over_chunks=2, grow_latents=4))
    lengths = []
    for index in range(4, 7):
        with chunk_of(session, index) as chunk:
            lengths.append(len(chunk.context))
    assert lengths == [1 + 4, 1 + 8, 24]


def test_steps_are_not_reused_for_a_view_that_was_made_under_another_prompt():
    plain = lipass.Session(preset="cache")
    _, plans = run(plain, 8, {0: [(DAY,)]})
    back = [plan.index for plan in plans if plan.revisit.allowed]
    assert back
    steered = lipass.Session(preset="cache")
    _, plans = run(steered, 8, {0: [(DAY,)], back[0]: [(NIGHT, 1, "hard")]})
    assert not any(plan.revisit.allowed for plan in plans)
    assert plans[back[0]].revisit.reason.startswith("the prompt changes, chunk 1 of 1, so all is")
    reason = plans[back[0] + 1].revisit.reason
    assert "was made under another prompt, so all is computed (revisits" in reason
    assert all(not plan.steps.reused for plan in plans)
    table = " ".join(current_report().table().split())
    assert "was made under another prompt" in table


def test_steps_are_not_reused_for_a_view_that_was_made_half_way():
    plain = lipass.Session(preset="cache")
    _, plans = run(plain, 8, {0: [(DAY,)]})
    seen = [(plan.index, plan.revisit.latent // 4) for plan in plans if plan.revisit.allowed]
    back, first = next((b, f) for b, f in seen if f and b > f + 2)
    steered = lipass.Session(preset="cache")
    _, plans = run(steered, back + 1, {0: [(DAY,)], first: [(NIGHT, 2, "lerp")]})
    assert plans[back].revisit.latent // 4 == first
    assert "was made under another prompt" in plans[back].revisit.reason


def test_steps_are_reused_again_where_the_prompt_is_the_one_of_the_memory():
    plain = lipass.Session(preset="cache")
    _, plans = run(plain, 8, {0: [(DAY,)]})
    back = next(plan.index for plan in plans if plan.revisit.allowed)
    steered = lipass.Session(preset="cache")
    said = {0: [(DAY,)], back - 2: [(NIGHT, 1, "hard")], back - 1: [(DAY, 1, "hard")]}
    _, plans = run(steered, back + 1, said)
    assert plans[back].revisit.allowed


def test_the_receipt_says_what_each_chunk_was_made_of():
    run(lipass.Session(preset="off"), 3, {0: [(DAY,)], 1: [(NIGHT, 2, "slerp")]})
    table = current_report().table()
    assert "prompt 1: slerp, chunk 1 of 2, weight 0.50" in table


def test_events_tell_of_the_prompt():
    events = []
    session = lipass.Session(preset="off", events=events.append)
    run(session, 3, {0: [(DAY,)], 1: [(NIGHT, 2, "lerp")]})
    told = [e["attributes"] for e in events if e["name"] == "lipass.chunk"]
    assert [one["lipass.prompt.number"] for one in told] == [0, 1, 1]
    assert [one["lipass.prompt.weight"] for one in told] == [1.0, 0.5, 1.0]
    assert told[1]["lipass.prompt.policy"] == "lerp"


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ((NIGHT, 4, "bogus"), ValueError, "policy must be one of hard, lerp"),
        ((NIGHT, 0), ValueError, "over_chunks must be >= 1, got 0; use 4"),
        ((NIGHT[0],), ValueError, "structure of the one before"),
        (([NIGHT[0][:, :2]],), ValueError, "shapes of the one before"),
        (([NIGHT[0] * float("nan")],), ValueError, "a text must be finite, got 48 NaN"),
        ((None,), TypeError, "got None"),
        ((["night"], 4, "lerp"), ValueError, "text without tensors of floats.*policy 'hard'"),
    ],
)
def test_a_session_is_as_it_was_where_steering_it_is_refused(given, error, said):
    session = lipass.Session(preset="off")
    run(session, 1, {0: [(DAY,)]})
    with pytest.raises(error, match=said):
        session.steer(*given)
    with chunk_of(session, 1) as chunk:
        assert chunk.text is DAY
    session.steer(NIGHT, 2, "lerp")


def test_a_change_needs_the_prompt_before_it():
    session = lipass.Session(preset="off")
    with chunk_of(session, 0) as chunk, pytest.raises(LipassError, match="got none for stream"):
        _ = chunk.text
    with pytest.raises(LipassError, match=r"got none for the 1 chunks.*before the first chunk"):
        session.steer(NIGHT)


def test_prompts_that_are_no_tensors_are_replayed():
    session = lipass.Session(preset="off")
    _, plans = run(session, 2, {0: [("day", 4, "hard")], 1: [("night", 4, "hard")]})
    replay = lipass.Session.replay(plans)
    texts, _ = run(replay, 2, {0: [("day",), ("night",)]})
    assert texts == ["d", "n"]


def test_prompts_that_are_no_tensors_can_be_said_at_once():
    session = lipass.Session(preset="off")
    session.steer("a room at day", policy="hard")
    run_text = []
    for index in range(2):
        with chunk_of(session, index) as chunk:
            run_text.append(chunk.text)
        session.steer("a room at night", policy="hard")
    assert run_text == ["a room at day", "a room at night"]


def test_a_closed_session_is_not_steered_and_holds_no_text():
    session = lipass.Session(preset="off")
    session.steer(DAY)
    session.close()
    with pytest.raises(LipassError, match="a prompt needs an open session"):
        session.steer(NIGHT)


def test_texts_that_nothing_is_made_of_any_more_are_let_go():
    session = lipass.Session(preset="off")
    session.steer(DAY)
    for index in range(90):
        query = torch.eye(4).expand(4, 4, 4)
        with session.chunk(poses=torch.eye(4).expand(4 * index, 4, 4) if index else None,
                           query=query) as chunk:  # fmt: skip
            _ = chunk.memory, chunk.text
        session.steer([DAY[0] + index], 1, "hard")
    assert len(session.prompts._told["main"].texts) < 70


def test_a_loop_that_drops_latents_says_so():
    session = lipass.Session(preset="off")
    run(session, 4, {0: [(DAY,)], 2: [(NIGHT, 1, "hard")]})
    session.prompts.moved([*range(4), *range(8, 16)])
    query = WAY_BACK[16:20]
    with session.chunk(poses=torch.cat([WAY_BACK[:4], WAY_BACK[8:16]]), query=query) as chunk:
        assert [latents[0] for _, latents in chunk.memory] == [0, 4]
        assert chunk.plan.steering.since == 4
