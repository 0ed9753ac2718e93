"""Items keep their order, wait where there is no room, and are forgotten; here and apart alike."""

import os
import random
import threading
import time

import pytest
import torch
from made import obedient

import lipass
from lipass import LipassError, Stage, Stages
from lipass.stages import StageError, is_stale


def numbers(results):
    return [one["n"] for one in results]


def test_results_come_in_order(stages):
    items = [{"n": n, "first": {"sleep": 0.02 * (n % 2)}} for n in range(7)]
    assert numbers(stages.run(items)) == list(range(7))
    assert stages.under_way == 0


def test_every_stage_computes_every_item_in_turn(stages):
    (found,) = stages.run([{"n": 0}])
    assert [name for name, *_ in found["trace"]] == ["first", "second"]


def test_stages_record_no_gradients(stages):
    (found,) = stages.run([{"x": torch.ones(2, requires_grad=True)}])
    assert not found["grad"]


def test_shapes_may_vary_from_item_to_item(stages):
    items = [{"x": torch.randn(n, 3, n + 1), "empty": torch.ones(0, n)} for n in range(1, 6)]
    for item, found in zip(items, stages.run(items), strict=True):
        assert torch.equal(item["x"], found["x"])
        assert found["empty"].shape == item["empty"].shape


def test_apart_means_in_processes_of_their_own(apart):
    (found,) = apart.run([{}])
    processes = {process for _, process, _ in found["trace"]} | {os.getpid()}
    assert len(processes) == 3


def test_stages_apart_compute_at_the_same_time(apart):
    items = [{"first": {"sleep": 0.1}, "second": {"sleep": 0.1}} for _ in range(10)]
    began = time.perf_counter()
    assert len(list(apart.run(items))) == 10
    took = time.perf_counter() - began
    assert took < 0.8 * 2.0  # one after the other they sleep for 2 s


def test_apart_gives_the_bits_of_one_process():
    torch.set_num_threads(1)
    given = [torch.randn(17, 17 + n) for n in range(4)]
    line = [
        Stage("a", "made:Scale", {"by": 0.3}, threads=1),
        Stage("b", "made:Scale", {"by": -0.1}, threads=1),
    ]
    with Stages(line) as alone, Stages(line, apart=True, depth=2) as apart:
        for one, other in zip(alone.run(given), apart.run(given), strict=True):
            assert torch.equal(one, other)


def test_an_error_is_told_at_its_turn_and_the_next_item_goes_on(stages):
    for n in range(2):
        stages.put({"n": n, "second": {"raise": "no such frame"} if n == 0 else {}})
    with pytest.raises(
        StageError, match=r"got ValueError from stage 'second' at item \d+"
    ) as told:
        stages.get()
    assert told.value.stage == "second"
    assert told.value.kind == "ValueError"
    assert 'raise ValueError(asked["raise"])' in str(told.value)
    assert "no such frame" in str(told.value)
    assert stages.get()["n"] == 1


def test_an_error_of_the_first_stage_does_not_overtake(stages):
    stages.put({"n": 0, "second": {"sleep": 0.1}})
    stages.put({"n": 1, "first": {"raise": "too late"}})
    assert stages.get()["n"] == 0
    with pytest.raises(StageError, match="'first'"):
        stages.get()


def test_what_cannot_be_handed_over_is_an_error_of_its_stage(stages):
    stages.put({"first": {"unplain": True}})
    with pytest.raises(StageError, match="what is handed over must be tensors"):
        stages.get()


def test_an_item_that_cannot_be_handed_over_is_not_put(stages):
    with pytest.raises(TypeError, match="what is handed over"):
        stages.put(object())
    assert stages.under_way == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stage", ["first", "second"])
def test_an_item_that_ctrl_c_interrupts_is_computed_by_the_next_get(here, stage):
    here.put({"n": 0, stage: {"interrupt": True}})
    here.put({"n": 1})
    with pytest.raises(KeyboardInterrupt):
        here.get()
    assert here.under_way == 2
    found = here.get()
    assert (found["n"], found["history"]) == (0, [None])  # the first stage has returned it once
    assert here.get()["n"] == 1
    with pytest.raises(LipassError, match="got none"):
        here.get(timeout_s=0.01)


def test_an_item_that_ctrl_c_interrupts_can_be_given_up(here):
    here.put({"n": 0, "first": {"remember": "never seen"}, "second": {"interrupt": True}})
    with pytest.raises(KeyboardInterrupt):
        here.get()
    assert here.forget() == 1
    (found,) = here.run([{"n": 1, "first": {"remember": "shown"}}])
    assert (found["n"], found["history"]) == (1, ["shown"])


def test_ctrl_c_while_a_stage_forgets_makes_it_forget_anew(here):
    here.put({"n": 0, "second": {"raise": "nobody sees what the first stage made"}})
    with pytest.raises(StageError):
        here.get()
    here.put({"n": 1})
    here.forget()
    here.put({"n": 2})
    stage = here._line.workers[0]._computes

    def interrupted(count):
        del stage.forget  # once
        raise KeyboardInterrupt

    stage.forget = interrupted
    with pytest.raises(KeyboardInterrupt):
        here.get()
    found = here.get()
    assert found["n"] == 2
    assert [forgotten for _, _, forgotten in found["trace"]] == [[1], []]


def test_forgotten_items_are_never_shown(stages):
    for n in range(3):
        stages.put({"n": n, "second": {"sleep": 0.05}})
    assert stages.get()["n"] == 0
    assert stages.forget() == 2
    assert numbers(stages.run([{"n": n} for n in (10, 11)])) == [10, 11]


def test_stages_learn_how_many_of_their_results_nobody_has_seen(stages):
    def forgotten():
        (found,) = stages.run([{}])
        return [list(counts) for _, _, counts in found["trace"]]

    before = forgotten()
    for n in range(3):
        stages.put({"n": n, "second": {"sleep": 0.2 if n == 1 else 0.0}})
    stages.get()
    time.sleep(0.1)  # apart, the first stage has done two more by now, and here none
    stages.forget()
    for own, seen in zip(forgotten(), before, strict=True):
        assert own[: len(seen)] == seen
        assert 0 <= sum(own[len(seen) :]) <= 2
    before = forgotten()
    stages.forget()  # of nothing
    assert forgotten() == before


def test_a_stage_that_keeps_a_history_goes_back_to_what_was_shown(stages):
    (found,) = stages.run([{"first": {"remember": "shown"}}])
    for _ in range(3):
        stages.put({"first": {"remember": "never seen"}, "second": {"sleep": 0.05}})
    stages.forget()
    (found,) = stages.run([{"first": {"remember": "shown too"}}])
    assert found["history"][-2:] == ["shown", "shown too"]


def test_a_stage_can_stop_when_its_item_is_stale(apart):
    apart.forget()
    apart.put({"first": {"work_until_stale": 20.0}})
    time.sleep(0.1)
    began = time.monotonic()
    apart.forget()
    apart.put({"n": 1})
    assert apart.get()["n"] == 1
    assert time.monotonic() - began < 10.0


def test_a_stage_here_is_told_by_another_thread(here):
    here.put({"first": {"work_until_stale": 20.0}})
    told = threading.Timer(0.1, here.forget)
    told.start()
    with pytest.raises(LipassError, match="under way to be taken, got none"):
        here.get()
    told.join()


def test_an_item_that_is_left_half_done_takes_nothing_back(stages):
    """What its stage had made before was shown, and stays."""
    (found,) = stages.run([{"first": {"remember": "shown"}}])
    before = found["trace"][0][2]
    stages.put({"first": {"work_until_stale": 20.0, "remember": "half done"}})
    told = threading.Timer(0.2, stages.forget)
    told.start()
    with pytest.raises(LipassError, match="under way to be taken, got none"):
        stages.get()
    told.join()
    (found,) = stages.run([{"first": {"remember": "shown too"}}])
    assert found["history"][-2:] == ["shown", "shown too"]
    assert found["trace"][0][2] == before


def test_an_item_that_is_left_and_wanted_is_an_error(stages):
    stages.put({"first": {"leave": True}})
    with pytest.raises(StageError, match="got Stale from stage 'first'"):
        stages.get()


def test_outside_of_stages_nothing_is_stale():
    assert not is_stale()


def test_an_item_too_many_is_refused_where_nobody_could_make_room(stages):
    def put_all():
        for n in range(20):
            stages.put({"n": n})

    with pytest.raises(LipassError, match=r"must have room .* take one with get\(\) first"):
        put_all()
    assert 2 <= stages.under_way <= 5
    got = [stages.get()["n"] for _ in range(stages.under_way)]
    assert got == list(range(len(got)))


def test_a_producer_waits_for_a_consumer(stages):
    got = []

    def consume():
        for _ in range(12):
            got.append(stages.get(timeout_s=20.0)["n"])
            time.sleep(0.01)

    thread = threading.Thread(target=consume)
    thread.start()
    for n in range(12):
        stages.put({"n": n}, timeout_s=20.0)
    thread.join()
    assert got == list(range(12))


def test_nothing_to_take_is_said_at_once(stages):
    with pytest.raises(LipassError, match="got none; put an item first"):
        stages.get()
    began = time.monotonic()
    with pytest.raises(LipassError, match="got none"):
        stages.get(timeout_s=0.05)
    assert time.monotonic() - began >= 0.05


def test_items_are_asked_for_when_they_can_be_put(stages):
    asked = []

    def items():
        for n in range(8):
            asked.append(n)
            yield {"n": n}

    most = 0
    for shown, _ in enumerate(stages.run(items())):
        most = max(most, len(asked) - shown)
    assert most <= 4


def test_a_closed_line_says_so():
    stages = Stages(obedient("only"))
    stages.close()
    stages.close()
    for call in (lambda: stages.put(1), stages.get, stages.forget):
        with pytest.raises(LipassError, match="got a closed one"):
            call()


def test_what_close_of_a_stage_raises_is_raised_behind_the_others(tmp_path):
    line = [*obedient("first", closes="raise"), *obedient("second", closes=str(tmp_path / "x"))]
    with pytest.raises(OSError, match="disk is full"), Stages(line):
        pass
    assert (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        (lambda: Stages([]), TypeError, "stages must be one lipass.Stage or more"),
        (lambda: Stages([len]), TypeError, "stages must be one lipass.Stage or more"),
        (lambda: Stages(obedient("a", "a")), ValueError, "names of their own"),
        (lambda: Stages(obedient("a"), depth=0), ValueError, "depth must be 1 or more, got 0"),
        (lambda: Stages(obedient("a"), backend="mpi"), ValueError, "must be one of gloo, nccl"),
        (lambda: Stage("", "a:b"), ValueError, "must have a name"),
        (lambda: Stage("a", "made"), ValueError, "must be 'module:name', got 'made'"),
        (lambda: Stage("a", 3), TypeError, "must be a function, a class"),
        (lambda: Stage("a", "a:b", {"x": torch.ones(1)}), TypeError, "must be plain data"),
        (lambda: Stage("a", "a:b", threads=0), ValueError, "threads of stage 'a' must be 1"),
        (lambda: Stage("a", "a:b", device="gpu7"), RuntimeError, "gpu7"),
        (lambda: Stages([Stage("a", "made:no_callable")]), TypeError, "must return a callable"),
        (lambda: Stages([Stage("a", lambda: len)], apart=True), TypeError, "must be importable"),
        (lambda: Stages([Stage("a", "made:Gone")]), AttributeError, "Gone"),
        (
            lambda: Stages(obedient("a"), apart=True, backend="nccl"),
            LipassError,
            "backend 'nccl' must",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, kind, says):
    with pytest.raises(kind, match=says):
        given()


def test_one_process_takes_what_is_at_hand():
    with Stages([Stage("double", lambda: lambda x: 2 * x)]) as stages:
        assert list(stages.run([1, 2])) == [2, 4]


def test_front_door_is_there():
    assert lipass.Stages is Stages
    assert lipass.Stage is Stage


@pytest.mark.parametrize("seed", range(4))
def test_random_scripts_give_what_was_put_in_order(stages, seed):
    draw, expected, n = random.Random(seed), [], 0
    for _ in range(60):
        what = draw.choice(["put", "put", "get", "get", "forget"])
        if what == "put" and len(expected) < 2:
            fails = draw.random() < 0.2
            stage = draw.choice(["first", "second"])
            stages.put({"n": n, stage: {"raise": "x"} if fails else {}, "x": torch.ones(n % 5)})
            expected.append((n, stage if fails else None))
            n += 1
        elif what == "get" and expected:
            number, fails = expected.pop(0)
            if fails is None:
                assert stages.get()["n"] == number
            else:
                with pytest.raises(StageError, match=f"'{fails}'"):
                    stages.get()
        elif what == "forget" and draw.random() < 0.3:
            assert stages.forget() == len(expected)
            expected.clear()
    assert stages.under_way == len(expected)
