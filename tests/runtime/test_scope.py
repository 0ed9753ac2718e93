"""Which chunk and step a model call belongs to, or that nobody can tell."""

import asyncio
import contextlib
import contextvars
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mini_decode import SIGMAS, Mini, chunk, compiled, inputs, level, reusing

import lipass
from lipass.errors import LipassError
from lipass.policy.trajectory import parse_trajectory
from lipass.runtime import scope
from lipass.session import current, current_chunk, current_step

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X, W2C, TEXT, HISTORY = inputs()


@pytest.fixture
def model():
    return Mini().eval()


@pytest.fixture
def fast(model):
    return compiled(model)


def call(fast, step, x=X):
    return fast(x, level(step.sigma), W2C, TEXT, HISTORY)


@pytest.fixture(autouse=True)
def _nothing_stays_open():
    yield
    assert not scope._everywhere


def test_inner_session_is_not_answered_from_the_outer_step(fast, model):
    args = X * 3, level(0.1), W2C, -TEXT, HISTORY
    with reusing() as session, chunk(session, W2C) as now:
        for step in now.steps(SIGMAS):
            if step.index == 1:
                with lipass.Session(preset="exact") as inner, chunk(inner, W2C):
                    torch.testing.assert_close(fast(*args), model(*args))
            call(fast, step)
    assert (now.lookups, now.misses) == (2, 0)


def test_inner_chunk_of_the_same_session_hides_the_outer_step(fast, model):
    with reusing() as session, chunk(session, W2C) as now:
        for step in now.steps(SIGMAS):
            if step.index == 1:
                with chunk(session, W2C, stream="preview"):
                    assert current_step() is None
                    want = model(X, level(0.75), W2C, TEXT, HISTORY)
                    torch.testing.assert_close(call(fast, step), want)
            call(fast, step)
    assert now.lookups == 2


@pytest.mark.parametrize("leave", ["break", "exception", "return", "next"])
def test_loop_that_was_left_answers_no_later_call(fast, model, leave):
    def go(now):
        loop = now.steps(SIGMAS)  # kept in a variable
        if leave == "next":
            call(fast, next(loop))
            next(loop)
            loop.close()
            return loop
        for step in loop:
            if step.index == 1:
                if leave == "break":
                    break
                if leave == "return":
                    return loop
                raise RuntimeError("out of memory")
            call(fast, step)
        return loop

    with reusing() as session, chunk(session, W2C) as now:
        kept = []
        with contextlib.suppress(RuntimeError):
            kept.append(go(now))
        got = fast(X * 2, level(0.0), W2C, TEXT, HISTORY)
    torch.testing.assert_close(got, model(X * 2, level(0.0), W2C, TEXT, HISTORY))
    assert now.lookups == 0


def test_old_loop_that_is_closed_late_forgets_only_its_own(fast):
    with reusing() as session, chunk(session, W2C) as now:
        old = now.steps(SIGMAS)
        next(old)
        for step in now.steps(SIGMAS):
            call(fast, step)
            if step.index == 1:
                old.close()
                del old
    assert (now.lookups, now.misses) == (2, 0)


def test_steps_of_a_chunk_that_is_not_open_are_refused(fast):
    with reusing() as session, pytest.raises(LipassError, match="got chunk 0 of 'main'"):
        next(chunk(session, W2C).steps(SIGMAS))


@pytest.mark.parametrize("entered", [False, True])
def test_session_closed_in_mid_loop_is_told_at_the_next_step(fast, model, entered):
    session, seen = reusing(), []

    def go():
        with chunk(session, W2C) as now:
            for step in now.steps(SIGMAS):
                seen.append(step.index)
                with step if entered else contextlib.nullcontext():
                    session.close()
                    want = model(X, level(step.sigma), W2C, TEXT, HISTORY)
                    torch.testing.assert_close(call(fast, step), want)

    with pytest.raises(LipassError, match="close the session later"):
        go()
    assert seen == [0]


def test_two_loops_side_by_side_are_refused(fast):
    with reusing() as session, chunk(session, W2C) as now:
        one, other = now.steps(SIGMAS), now.steps(SIGMAS)
        call(fast, next(one))
        call(fast, next(other))
        with pytest.raises(LipassError, match="one loop of steps at a time, got step 1 of one"):
            next(one)
        for step in now.steps(SIGMAS):
            call(fast, step)
    assert now.lookups == 2


def test_steps_taken_as_a_list_are_refused_where_one_is_reused(fast):
    with reusing() as session, chunk(session, W2C) as now:
        steps = list(now.steps(SIGMAS))
        with pytest.raises(LipassError, match=r"iterate over chunk.steps\(...\) itself"):
            call(fast, steps[0])


def test_steps_of_a_list_that_are_entered_are_answered(fast):
    with reusing() as session, chunk(session, W2C) as now:
        for step in list(now.steps(SIGMAS)):
            with step:
                call(fast, step)
    assert (now.lookups, now.misses) == (2, 0)


def test_steps_have_a_length_and_take_part_in_enumerate(fast):
    with reusing() as session, chunk(session, W2C) as now:
        steps = now.steps(SIGMAS)
        assert len(steps) == 4
        for place, step in enumerate(steps):
            assert place == step.index
            call(fast, step)
    assert now.lookups == 2


@pytest.mark.parametrize("copied", [False, True], ids=["bare", "copied context"])
def test_worker_thread_of_the_only_open_step_is_answered(fast, copied):
    with ThreadPoolExecutor(1) as pool, reusing() as session, chunk(session, W2C) as now:
        for step in now.steps(SIGMAS):
            run = contextvars.copy_context().run if copied else lambda fn, *args: fn(*args)
            with torch.no_grad():
                pool.submit(run, call, torch.no_grad()(fast), step).result()
    assert (now.lookups, now.misses) == (2, 0)


def test_worker_threads_of_two_users_compute(fast, model):
    """Nobody can tell whose call it is, so nothing is answered."""
    with (
        ThreadPoolExecutor(1) as pool,
        reusing() as session,
        chunk(session, W2C, stream="a") as a,
        chunk(session, W2C, stream="b") as b,
    ):
        for one, _ in zip(a.steps(SIGMAS), b.steps(SIGMAS), strict=True):
            got = pool.submit(torch.no_grad()(call), fast, one).result()
            want = model(X, level(one.sigma), W2C, TEXT, HISTORY)
            torch.testing.assert_close(got, want)
    assert (a.lookups, b.lookups) == (0, 0)


def test_thread_with_a_session_of_its_own_is_not_answered_from_another(fast, model):
    seen = []

    @torch.no_grad()
    def other():
        with lipass.Session(preset="exact") as session, chunk(session, W2C):
            seen.append((current_step(), fast(X, level(0.75), W2C, TEXT, HISTORY)))

    with reusing() as session, chunk(session, W2C) as now:
        for step in now.steps(SIGMAS):
            if step.index == 1:
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
            call(fast, step)
    ((step, got),) = seen
    assert step is None
    torch.testing.assert_close(got, model(X, level(0.75), W2C, TEXT, HISTORY))
    assert now.lookups == 2


def test_generator_run_in_copied_contexts_is_answered(fast):
    chunks = []

    def frames():
        with reusing() as session, chunk(session, W2C) as now:
            chunks.append(now)
            for step in now.steps(SIGMAS):
                yield call(fast, step)

    run = frames()
    while contextvars.copy_context().run(next, run, None) is not None:
        pass
    assert (chunks[0].lookups, chunks[0].misses) == (2, 0)


def test_generator_that_is_dropped_leaves_nothing_open(fast):
    def frames():
        with reusing() as session, chunk(session, W2C) as now:
            for step in now.steps(SIGMAS):
                yield call(fast, step)

    run = frames()
    next(run)
    next(run)
    del run
    gc.collect()
    assert current() is None
    assert not scope._everywhere


def test_generator_closed_in_another_thread_leaves_nothing_open(fast):
    def frames():
        with reusing() as session, chunk(session, W2C) as now:
            for step in now.steps(SIGMAS):
                with step:
                    yield call(fast, step)

    run = frames()
    next(run)
    thread = threading.Thread(target=run.close)
    thread.start()
    thread.join()
    assert current() is None
    assert current_chunk() is None


def test_tasks_that_take_turns_follow_their_own(fast):
    async def user(seed):
        x, *_ = inputs(seed=seed)
        with reusing() as session, chunk(session, W2C) as now:
            for step in now.steps(SIGMAS):
                await asyncio.sleep(0)
                call(fast, step, x)
                await asyncio.to_thread(lambda: None)
        return now.lookups, now.misses

    async def both():
        return await asyncio.gather(user(1), user(2))

    assert asyncio.run(both()) == [(2, 0), (2, 0)]


def sample(model):
    def loop(x, sigmas, w2c, text, history):
        for i in range(4):
            v = model(x, sigmas[i : i + 1], w2c, text, history)
            x = x + (sigmas[i + 1] - sigmas[i]) * v
        return x

    return loop


def test_worker_thread_with_the_loop_in_the_graph_follows_the_plan(model):
    loop, sigmas = sample(model), torch.tensor(SIGMAS)
    fast = torch.no_grad()(compiled(loop))
    with (
        ThreadPoolExecutor(1) as pool,
        reusing(**{"steps.form": "merge"}) as session,
        chunk(session, W2C) as now,
    ):
        pool.submit(fast, X, sigmas, W2C, TEXT, HISTORY).result()
    assert now.lookups == 2


def test_worker_thread_reads_what_its_chunk_chose(fast):
    with ThreadPoolExecutor(1) as pool, reusing() as session, chunk(session, W2C) as now:
        assert pool.submit(current_chunk).result() is now
        assert pool.submit(current).result() is session
        pool.submit(torch.no_grad()(fast), X, level(0.5), W2C, TEXT, HISTORY).result()
    assert now.latents_read == 2


def test_worker_thread_of_steps_that_were_taken_as_a_list(fast):
    with ThreadPoolExecutor(1) as pool, reusing() as session, chunk(session, W2C) as now:
        steps = list(now.steps(SIGMAS))
        with pytest.raises(LipassError, match="inside `with step:`"):
            pool.submit(call, fast, steps[0]).result()
        for step in steps:
            with step:
                pool.submit(torch.no_grad()(call), fast, step).result()
    assert (now.lookups, now.misses) == (2, 0)


def test_two_users_with_the_loop_in_the_graph_follow_their_own_plan(model):
    loop, sigmas = sample(model), torch.tensor(SIGMAS)
    fast = compiled(loop)

    def user(session, name, poses, m):
        query = poses[m : m + 4]
        with session.chunk(poses=poses[:m], query=query, stream=name) as now:
            yield now.plan.revisit.allowed
            got = fast(X, sigmas, W2C, TEXT, HISTORY)
            yield (got - loop(X, sigmas, W2C, TEXT, HISTORY)).abs().max().item()

    forth, back = parse_trajectory("w-40"), parse_trajectory("right-30, left-30")
    with lipass.Session(preset="cache") as session:
        users = [user(session, "a", forth, 20), user(session, "b", back, 40)]
        assert [next(one) for one in users] == [False, True]
        exact, approximate = [next(one) for one in users]
        for one in users:
            one.close()
    assert exact < 1e-5 < approximate


def test_two_chunks_in_one_block_with_the_loop_in_the_graph_are_ambiguous(model):
    fast, sigmas = compiled(sample(model)), torch.tensor(SIGMAS)
    with (
        reusing() as session,
        chunk(session, W2C, stream="a"),
        chunk(session, W2C, stream="b"),
        pytest.raises(LipassError, match="must belong to one chunk, got open chunks of streams"),
    ):
        fast(X, sigmas, W2C, TEXT, HISTORY)


def test_blocks_of_an_exit_stack_count(fast):
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(reusing())
        now = stack.enter_context(chunk(session, W2C))
        for step in now.steps(SIGMAS):
            call(fast, step)
    assert (now.lookups, now.misses) == (2, 0)


def test_frame_of_a_closed_chunk_is_let_go():
    class Large:
        pass

    kept = []

    def run(session):
        large = Large()
        kept.append(weakref.ref(large))
        with chunk(session, W2C):
            pass

    with reusing() as session:
        run(session)
        gc.collect()
        assert kept[0]() is None
