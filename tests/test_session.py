import asyncio
import gc
import itertools
import threading
import weakref

import pytest
import torch

from lipass.config import Config
from lipass.errors import LipassError
from lipass.passes.graph.marks import StepInputs
from lipass.policy.plan import ChunkPlan
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import current_report, reset_report
from lipass.session import Session, current, current_chunk, current_step

SIGMAS = (1.0, 0.9375, 0.8333, 0.625, 0.0)
WAY_BACK = parse_trajectory("left-15, right-16")  # chunks 0-3 out, 4-7 back
LOOKUP = {"steps.form": "lookup"}


@pytest.fixture(autouse=True)
def _fresh_report():
    reset_report()


class Guarded:
    """A toy model behind the guard that a compiled unit uses."""

    inputs = StepInputs(("x", "sigma"), (), (), levels=(1,), latents=(0,))

    def __init__(self, weight=0.5):
        self.weight = weight
        self.computed = 0

    def __call__(self, x, sigma):
        step = current_step()
        if step is None:
            return self.compute((x, sigma))
        return step.call(self, self.inputs, (x, sigma), self.compute)

    def compute(self, args):
        x, sigma = args
        self.computed += 1
        return self.weight * x * x - sigma * x


def chunk_of(session, index, poses=WAY_BACK, **given):
    start = 4 * index
    history = poses[:start] if start else None
    return session.chunk(poses=history, query=poses[start : start + 4], **given)


def roll_out(session, model, *, stream="main", seed=0, chunks=range(8)):
    """Generate chunks; yields before each model call and after each chunk."""
    latents = []
    generator = torch.Generator().manual_seed(seed)
    for index in chunks:
        x = torch.randn(3, generator=generator)
        with chunk_of(session, index, stream=stream) as chunk:
            for step in chunk.steps(SIGMAS):
                yield None
                with step:
                    x = x + (step.sigma_next - step.sigma) * model(x, step.sigma)
        latents.append(x)
    yield torch.stack(latents)


def finish(rollout):
    for value in rollout:
        result = value
    return result


def session_of(preset="all", **options):
    return Session(Config.resolve(preset, options))


@pytest.mark.parametrize("form", ["merge", "lookup"])
def test_reused_steps_cost_nothing_and_equal_the_shorter_sampler(form):
    model = Guarded()
    with session_of("cache", **{"steps.form": form}) as session:
        got = finish(roll_out(session, model))
        plans = [record.plan for record in current_report().chunks]
    reusing = [p.index for p in plans if p.steps.reused]
    assert reusing == [5, 6, 7]
    assert model.computed == 5 * 4 + 3 * 2
    generator = torch.Generator().manual_seed(0)
    for index, latent in enumerate(got):
        x = torch.randn(3, generator=generator)
        sigmas = (1.0, 0.625, 0.0) if index in reusing else SIGMAS
        for sigma, after in itertools.pairwise(sigmas):
            x = x + (after - sigma) * Guarded()(x, sigma)
        torch.testing.assert_close(latent, x)


def test_merge_yields_computed_steps_and_lookup_all():
    with session_of("cache") as session, chunk_of(session, 6) as chunk:
        steps = [(s.index, s.sigma, s.sigma_next, s.reused) for s in chunk.steps(SIGMAS)]
    assert steps == [(0, 1.0, 0.625, False), (3, 0.625, 0.0, False)]
    with session_of("cache", **LOOKUP) as session, chunk_of(session, 6) as chunk:
        steps = [(s.index, s.sigma, s.sigma_next, s.reused) for s in chunk.steps(SIGMAS)]
    assert [s[0] for s in steps] == [0, 1, 2, 3]
    assert [s[3] for s in steps] == [False, True, True, False]


def test_sigmas_may_be_a_tensor_and_stay_one():
    with session_of("cache") as session, chunk_of(session, 6) as chunk:
        steps = list(chunk.steps(torch.tensor(SIGMAS)))
    assert steps[0].sigma_next.item() == pytest.approx(0.625)


@pytest.mark.parametrize("form", ["merge", "lookup"])
def test_two_interleaved_sessions_equal_separate_runs(form):
    options = {"steps.form": form}
    alone = []
    for seed in (1, 2):
        with session_of("all", **options) as session:
            alone.append(finish(roll_out(session, Guarded(), seed=seed)))
    with session_of("all", **options) as one, session_of("all", **options) as two:
        runs = [roll_out(one, Guarded(), seed=1), roll_out(two, Guarded(), seed=2)]
        results = interleave(runs)
    for together, apart in zip(results, alone, strict=True):
        assert torch.equal(together, apart)


def interleave(runs):
    results = [None] * len(runs)
    live = list(range(len(runs)))
    while live:
        for place in tuple(live):
            try:
                results[place] = next(runs[place])
            except StopIteration:
                live.remove(place)
    return [result for result in results if result is not None]


@pytest.mark.parametrize("form", ["merge", "lookup"])
def test_two_interleaved_streams_of_one_session_equal_separate_runs(form):
    options = {"steps.form": form}
    alone = []
    for seed in (1, 2):
        with session_of("all", **options) as session:
            alone.append(finish(roll_out(session, Guarded(), seed=seed)))
    model = Guarded()  # one model serves both
    with session_of("all", **options) as session:
        runs = [roll_out(session, model, seed=seed, stream=f"user {seed}") for seed in (1, 2)]
        results = interleave(runs)
    for together, apart in zip(results, alone, strict=True):
        assert torch.equal(together, apart)


def guided(session, cond, uncond, *, named):
    x = torch.ones(3)
    for index in range(8):
        with chunk_of(session, index) as chunk:
            for step in chunk.steps(SIGMAS):
                if named:
                    with session.stream("uncond"):
                        without = uncond(x, step.sigma)
                    with session.stream("cond"):
                        velocity = cond(x, step.sigma)
                else:
                    velocity, without = cond(x, step.sigma), uncond(x, step.sigma)
                guidance = without + 3 * (velocity - without)
                x = x + 0.1 * (step.sigma_next - step.sigma) * guidance
    return x


@pytest.mark.parametrize("named", [True, False], ids=["named branches", "by their inputs"])
def test_branches_of_guidance_do_not_answer_for_each_other(named):
    with session_of("cache", **LOOKUP) as session:
        looked_up = guided(session, Guarded(0.5), Guarded(0.1), named=named)
    with session_of("cache") as session:
        merged = guided(session, Guarded(0.5), Guarded(0.1), named=named)
    torch.testing.assert_close(looked_up, merged)
    assert sum(record.lookups for record in current_report().chunks) == 3 * 2 * 2
    assert sum(record.misses for record in current_report().chunks) == 0


def test_graphs_are_kept_apart():
    first, second = Guarded(0.5), Guarded(0.1)
    with session_of("cache", **LOOKUP) as session, chunk_of(session, 6) as chunk:
        x = torch.ones(3)
        for step in chunk.steps(SIGMAS):
            outputs = (first(x, step.sigma), second(x, step.sigma))
            if step.index == 0:
                stored = outputs
            if step.reused:
                assert torch.equal(outputs[0], stored[0])
                assert torch.equal(outputs[1], stored[1])
            x = x + 1


def test_call_that_has_nothing_stored_computes_and_is_counted():
    model = Guarded()
    with session_of("cache", **LOOKUP) as session, chunk_of(session, 6) as chunk:
        for step in chunk.steps(SIGMAS):
            for _ in range(2 if step.reused else 1):
                model(torch.ones(3), step.sigma)
    record = current_report().chunks[-1]
    assert (record.lookups, record.misses) == (2, 2)
    assert record.why_missed == {"the step that computed had fewer calls like it": 2}
    assert model.computed == 1 + 1 + 1 + 1


def test_nothing_is_kept_where_no_step_asks_for_it():
    with session_of("cache") as session, chunk_of(session, 6) as chunk:
        for step in chunk.steps(SIGMAS):
            Guarded()(torch.ones(3), step.sigma)
            assert not len(chunk.loop._outputs)


def test_nothing_of_a_chunk_survives_it():
    kept = []
    with session_of("cache", **LOOKUP) as session:
        with chunk_of(session, 6) as chunk:
            for step in chunk.steps(SIGMAS):
                if step.index == 0:
                    Guarded()(torch.ones(3), step.sigma)
                    kept.append(weakref.ref(chunk.loop._outputs._kept[0].value))
        gc.collect()
        assert kept[0]() is None


def test_nothing_of_a_session_survives_closing():
    session = session_of("all")
    latents = torch.randn(24, 2, 3, 3)
    reference = weakref.ref(latents)
    with session, chunk_of(session, 6, latents=latents) as chunk:
        list(chunk.steps(SIGMAS))
    del latents
    gc.collect()
    assert reference() is None
    assert current() is None
    assert current_step() is None
    assert not session.open_chunks
    assert session.turns.closed


def test_closed_session_refuses_and_says_what_to_do():
    with session_of("all") as session:
        pass
    with pytest.raises(LipassError, match="got a closed one; make a new one"):
        chunk_of(session, 2)
    with pytest.raises(LipassError, match="entered while open"):
        session.__enter__()
    session.close()


def test_session_closed_inside_a_chunk_leaves_nothing_open():
    session = session_of("cache", **LOOKUP)
    with session, chunk_of(session, 6) as chunk:
        for step in chunk.steps(SIGMAS):
            Guarded()(torch.ones(3), step.sigma)
            session.close()
            assert current_step() is None
            break
    assert chunk.loop is None
    assert len(current_report().chunks) == 0


def test_current_follows_the_innermost_block():
    assert current() is None
    with session_of("all") as outer:
        assert current() is outer
        with session_of("all") as inner, chunk_of(outer, 6) as chunk:
            assert current() is outer
            assert current_chunk() is chunk
            assert inner is not outer
        assert current() is outer
        assert current_chunk() is None


def test_no_step_outside_of_the_loop():
    with session_of("all") as session, chunk_of(session, 6) as chunk:
        assert current_step() is None  # prefill
        for step in chunk.steps(SIGMAS):
            assert current_step() is step.state
        assert current_step() is None


def test_leaving_the_loop_early_ends_the_step():
    with session_of("all") as session:
        with chunk_of(session, 6) as chunk:
            for _ in chunk.steps(SIGMAS):
                break
        assert current_step() is None


def test_open_steps_of_two_chunks_need_to_be_told_apart():
    with (
        session_of("all") as session,
        chunk_of(session, 6, stream="a") as a,
        chunk_of(session, 6, stream="b") as b,
    ):
        for one, other in zip(a.steps(SIGMAS), b.steps(SIGMAS), strict=True):
            with pytest.raises(
                LipassError, match=r"streams 'a', 'b'; call .* inside `with step:`"
            ):
                current_step()
            with one:
                assert current_step() is one.state
            with other:
                assert current_step() is other.state


def test_threads_do_not_see_each_other():
    seen = []
    with session_of("all"):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_thread_that_leaves_a_shared_session_ends_its_own_block():
    session, order, seen = Session(preset="off"), threading.Barrier(2, timeout=60), []
    entered = threading.Event()

    def first():
        with session:
            entered.set()
            order.wait()  # both are inside
        order.wait()

    def later():
        entered.wait(60)
        with session:
            order.wait()
            order.wait()  # the other one has left
            seen.append(current())

    threads = [threading.Thread(target=one) for one in (first, later)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [session]
    assert session.turns.closed


def test_tasks_do_not_see_each_other():
    async def task(seed):
        with session_of("cache", **LOOKUP) as session:
            result = None
            for value in roll_out(session, Guarded(), seed=seed):
                result = value
                assert current() is session
                await asyncio.sleep(0)
            return result

    async def both():
        return await asyncio.gather(task(1), task(2))

    for seed, result in zip((1, 2), asyncio.run(both()), strict=True):
        with session_of("cache", **LOOKUP) as session:
            assert torch.equal(result, finish(roll_out(session, Guarded(), seed=seed)))


@pytest.mark.parametrize("preset", ["off", "all", "reference"])
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"poses": WAY_BACK[:0]}, ValueError, "at least one camera, got none"),
        ({"poses": WAY_BACK[:24] * float("nan")}, ValueError, "finite, got NaN"),
        ({"poses": WAY_BACK[0]}, ValueError, "shape"),
        ({"query": None}, ValueError, "query must hold the new latents' cameras, got None; pass"),
        ({"query": WAY_BACK[:4].to("meta")}, ValueError, "meta"),
    ],
)
def test_refused_chunk_leaves_the_session_usable(preset, given, error, words):
    with session_of(preset) as session:
        call = {"poses": WAY_BACK[:24], "query": WAY_BACK[24:28], **given}
        with pytest.raises(error, match=words):
            session.chunk(**call)
        with chunk_of(session, 6) as chunk:
            assert chunk.index == 0
            assert len(list(chunk.steps(SIGMAS))) >= 2


def test_failed_chunk_may_be_tried_again():
    with session_of("all") as session:
        with pytest.raises(RuntimeError, match="out of memory"), chunk_of(session, 6):
            raise RuntimeError("out of memory")
        assert current_chunk() is None
        with chunk_of(session, 6) as chunk:
            assert chunk.index == 0
        assert chunk_of(session, 7).index == 1
    assert len(current_report().chunks) == 1


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        ((1.0,), r"at least two noise levels, got shape \[1\]; include the last"),
        ((), r"got shape \[0\]"),
        (torch.ones(2, 5), r"got shape \[2, 5\]"),
        ((1.0, float("nan"), 0.0), "finite, got nan at place 1; check the schedule"),
    ],
)
def test_wrong_sigmas_are_refused_and_the_chunk_goes_on(sigmas, words):
    with session_of("all") as session, chunk_of(session, 6) as chunk:
        with pytest.raises(ValueError, match=words):
            chunk.steps(sigmas)
        assert len(list(chunk.steps(SIGMAS))) == 2
        with pytest.raises(ValueError, match="one number of steps, got 2 after 4"):
            chunk.steps((1.0, 0.5, 0.0))


def test_step_plan_is_the_one_that_the_loop_follows():
    with session_of("cache") as session, chunk_of(session, 6) as chunk:
        plan = chunk.step_plan(4)
        assert plan.reused == (1, 2)
        assert [step.index for step in chunk.steps(SIGMAS)] == list(plan.computed)
        assert chunk.plan.steps is plan


def test_chunk_that_was_generated_is_not_entered_again():
    with session_of("all") as session:
        with chunk_of(session, 6) as chunk:
            pass
        with pytest.raises(LipassError, match="generated once, got chunk 0 of stream 'main'"):
            chunk.__enter__()
        assert chunk_of(session, 7).index == 1
    assert len(current_report().chunks) == 1


def test_stream_has_one_open_chunk():
    with session_of("all") as session, chunk_of(session, 6):
        with pytest.raises(LipassError, match="one chunk at a time, got a second for 'main'"):
            chunk_of(session, 7)
        with chunk_of(session, 7, stream="other") as other:
            assert other.index == 0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Session("all"), TypeError, r"lipass.Config, got 'all'; write Session\(preset="),
        (lambda: Session(Config.resolve("all"), preset="all"), TypeError, "got both"),
        (lambda: Session(preset="al"), ValueError, "did you mean 'all'"),
        (lambda: Session(**{"context.overlap": 0.3}), ValueError, "did you mean 'context.overlap"),
    ],
)
def test_wrong_construction_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_options_reach_the_config():
    session = Session(preset="cache", hfov_deg=75, **LOOKUP)
    assert session.config == Config.resolve("cache", {"hfov_deg": 75, **LOOKUP})


@pytest.mark.parametrize("form", ["merge", "lookup"])
def test_recorded_plans_replay_without_poses_or_policies(form):
    with session_of("all", **{"steps.form": form}) as session:
        recorded = finish(roll_out(session, Guarded(), seed=3))
        texts = [record.plan.to_json() for record in current_report().chunks]
    plans = [ChunkPlan.from_json(text) for text in texts]
    generator = torch.Generator().manual_seed(3)
    with Session.replay(plans) as session:
        for index, plan in enumerate(plans):
            x = torch.randn(3, generator=generator)
            with session.chunk() as chunk:
                assert chunk.context == plan.context.indices
                model = Guarded()
                for step in chunk.steps(SIGMAS):
                    x = x + (step.sigma_next - step.sigma) * model(x, step.sigma)
            assert torch.equal(x, recorded[index])
        with pytest.raises(LipassError, match="got one more for 'main'; recorded streams: main"):
            session.chunk()


def test_replay_refuses_another_history():
    with session_of("all") as session, chunk_of(session, 6) as chunk:
        plan = chunk.plan
    replayed = Session.replay([plan])
    with pytest.raises(ValueError, match="got 20 cameras for 24 latents; replay with"):
        replayed.chunk(poses=WAY_BACK[:20])
    with replayed.chunk(poses=WAY_BACK[:24]) as chunk:
        assert chunk.plan == plan


@pytest.mark.parametrize("preset", ["reference-matrix-game", None])
def test_replay_takes_cameras_of_video_frames_where_they_were_recorded(preset):
    """Of a model whose latents are four frames each; without a config it is not known of what."""
    cameras, ends = torch.eye(4).expand(137, 4, 4), (0, 57, 97, 137)

    def roll_out(session):
        for start, end in itertools.pairwise(ends):
            past = cameras[:start] if start else None
            with session.chunk(poses=past, query=cameras[start:end]) as chunk:
                yield chunk.plan

    plans = list(roll_out(Session(preset="reference-matrix-game")))
    assert [plan.history_latents for plan in plans] == [0, 15, 25]
    config = None if preset is None else Config.resolve(preset)
    assert list(roll_out(Session.replay(plans, config))) == plans
    replayed = Session.replay(plans[1:], config)
    with pytest.raises(ValueError, match="got 61 cameras for 15 latents"):
        replayed.chunk(poses=cameras[:61])
    with pytest.raises(ValueError, match="got 57 cameras for 15 latents"):
        Session.replay(plans[1:], Config.resolve("all")).chunk(poses=cameras[:57])


def test_replay_knows_what_is_held():
    order = [3, 2, 1, 0, *range(4, 24)]
    with session_of("all") as session, chunk_of(session, 6, held=order) as chunk:
        plan = chunk.plan
    replayed = Session.replay([plan])
    with pytest.raises(ValueError, match="must hold what its plan reads, got none of"):
        replayed.chunk(held=[1])
    with pytest.raises(ValueError, match="held must hold indices of the 24 history latents"):
        replayed.chunk(held=[24])
    with replayed.chunk(held=order) as chunk:
        assert (chunk.held, chunk.says_held) == (tuple(order), True)


@pytest.mark.parametrize("preset", ["off", "all"])
@pytest.mark.parametrize("made", [torch.tensor, lambda held: torch.tensor(held).numpy()])
def test_what_is_held_may_be_a_tensor(preset, made):
    """Its members are numbers: of tensors none is among what was chosen."""
    order = [*range(8, 24), *range(4)]
    with session_of(preset) as session, chunk_of(session, 6, held=order) as chunk:
        plan = chunk.plan
    for again in (session_of(preset), Session.replay([plan])):
        with again, chunk_of(again, 6, held=made(order)) as chunk:
            assert (chunk.held, chunk.context) == (tuple(order), plan.context.indices)
            assert {type(latent) for latent in chunk.held} == {int}


def test_what_is_held_is_checked_where_the_loop_reads_by_itself():
    said = "held must hold indices of the 24 history latents"
    with session_of("off") as session, pytest.raises(ValueError, match=said):
        chunk_of(session, 6, held=[24], own_context=[0])


def test_first_chunk_without_cameras_needs_nothing_and_later_ones_a_history():
    session = Session(Config.resolve("all"))
    with session.chunk() as chunk:
        assert (list(chunk.context), len(list(chunk.steps((1.0, 0.5, 0.0))))) == ([], 2)
    with pytest.raises(ValueError, match=r"query must hold .* got None; .* first chunk"):
        session.chunk()
    with session.chunk(latents=torch.randn(4, 2, 3, 3)) as chunk:
        assert list(chunk.context) == [0, 1, 2, 3]
