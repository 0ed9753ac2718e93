"""Steps on half of the grid in loops of other kinds: refiners, guidance, pipelines, steering."""

import warnings

import pytest
import torch
from mini_decode import REUSE, SIGMAS, Mini, chunk, compiled, inputs, level

import lipass
from lipass.errors import LipassWarning
from lipass.kernels import registry
from lipass.policy.plan import ChunkPlan

REFINER = (0.3, 0.2, 0.1, 0.05, 0.0)
BY_DELTA = {"grow.delta": 0.05, "grow.spectrum": (0.2, 2.0), "grow.grid": (4, 4)}


def growing(preset="off", **told):
    options = {"grow": True, **(told or {"grow.steps": 2})}
    return lipass.Session(preset=preset, **options)


def grids(session_chunk, sigmas):
    """Take the steps of a list; say which were on half of the grid."""
    model, (x, w2c, text, history) = Mini(), inputs()
    seen = []

    def call(x, sigma):
        seen.append(x.shape[-1])
        return model(x, level(sigma), w2c, text, history)

    for step in session_chunk.steps(sigmas):
        x = x + (step.sigma_next - step.sigma) * step.velocity(call, x)
    return seen


def test_a_second_list_of_a_chunk_is_planned_by_its_own_levels():
    with growing(**BY_DELTA) as session, chunk(session, inputs()[1]) as one:
        assert grids(one, SIGMAS) == [2, 4, 4, 4]
        assert grids(one, REFINER) == [4, 4, 4, 4]
        assert one.plan.steps.coarse == ()
        assert all("half" not in reason for reason in one.plan.steps.reasons)
        assert grids(one, SIGMAS) == [2, 4, 4, 4]


def test_a_list_behind_another_that_is_taken_by_another_form_has_its_own_steps():
    class Scheduler:
        timesteps, sigmas = torch.tensor([999, 750, 500, 250]), torch.tensor(SIGMAS)

        def step(self, *args):
            raise NotImplementedError

    told = {**REUSE, "steps.form": "merge", "steps.reuse": (1,), "grow.steps": 1}
    with growing("cache", **told) as session, chunk(session, inputs()[1]) as one:
        one.steps(SIGMAS)
        assert one.plan.steps.coarse == (0,)
        one.steps(Scheduler())
        assert (one.plan.steps.form, one.plan.steps.coarse) == ("lookup", (0, 1))
        one.coarse.taken.add(0)  # nothing is called here


def test_a_replay_refuses_levels_for_which_no_step_could_have_been_planned():
    with growing() as session, chunk(session, inputs()[1]) as one:
        grids(one, SIGMAS)
    plan = ChunkPlan.from_json(lipass.report().chunks[-1].plan.to_json())
    with (
        lipass.Session.replay([plan]) as again,
        chunk(again, inputs()[1]) as one,
        pytest.raises(ValueError, match=r"levels of flow matching, in 0\.\.1, got 80"),
    ):
        one.steps((80.0, 20.0, 5.0, 1.0, 0.0))


def test_a_reused_step_answers_a_branch_once_and_only_with_its_own():
    model, (x, w2c, text, history) = Mini(), inputs()
    told = {**REUSE, "steps.reuse": (1,), "grow.steps": 1}
    calls = []

    def ask(step, words):
        def call(x, sigma):
            calls.append(words)
            return model(x, level(sigma), w2c, {"with": text, "without": -text}[words], history)

        return step.velocity(call, x)

    with growing("cache", **told) as session, chunk(session, w2c) as one:
        first, second = (step for _, step in zip(range(2), one.steps(SIGMAS), strict=False))
        with first:
            ask(first, "with")
        with second:  # guidance that begins in this step
            kept, fresh = ask(second, "with"), ask(second, "without")
        assert calls == ["with", "without"]
        assert not torch.equal(kept, fresh)
        del calls[:]
        for step in (first, second):
            with step:
                for words in ("with", "without"):
                    with session.stream(words):
                        ask(step, words)
        assert calls == ["with", "without"]


def test_latents_that_a_change_of_the_prompt_gave_up_keep_the_chunk_on_the_whole_grid():
    w2c = torch.eye(4).repeat(24, 1, 1)
    w2c[:, 0, 3] = torch.arange(24) * 0.1
    with growing() as session:
        session.steer(torch.zeros(1, 2, 4), policy="hard")
        for end in (4, 8, 12):
            past = w2c[: end - 4] if end > 4 else None
            with session.chunk(poses=past, query=w2c[end - 4 : end]) as one:
                one.coarse.taken.add(0)  # nothing is called here
        session.steer(torch.ones(1, 2, 4), policy="flush")
        for end in (16, 20):
            with session.chunk(poses=w2c[: end - 4], query=w2c[end - 4 : end]) as one:
                one.steps(SIGMAS)
                assert one.plan.steps.coarse == ()
                assert "steering left out" in one.plan.steps.reasons[0]
                one.coarse.taken.add(0)  # nothing is called here


def test_a_pipeline_whose_levels_cannot_be_read_runs_and_is_told_once():
    class Clock:
        """A scheduler that knows no noise levels."""

        def set_timesteps(self, count):
            self.timesteps, self.num_inference_steps = torch.arange(count, 0, -1), count

        def step(self, v, t, x):
            return x

    def run(session, stream):
        clock = Clock()
        with chunk(session, inputs()[1], stream=stream) as one, one.follow(clock):
            clock.set_timesteps(4)
            for t in clock.timesteps:
                clock.step(None, t, None)
        assert one.plan.steps.coarse == ()

    with growing() as session:
        with pytest.warns(LipassWarning, match="a pipeline calls the model itself"):
            run(session, "first")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(session, "second")


def test_what_was_told_once_is_not_told_again_behind_a_snapshot():
    def own_loop(session):
        with chunk(session, inputs()[1]) as one:
            list(one.steps(SIGMAS))

    with growing() as session:
        with pytest.warns(LipassWarning, match="and none was"):
            own_loop(session)
        with session.fork() as fork, warnings.catch_warnings():
            warnings.simplefilter("error")
            with fork.chunk(poses=inputs()[1][0], query=inputs()[1][0]) as one:
                list(one.steps(SIGMAS))


def test_a_level_of_each_sample_shapes_itself_to_the_latents():
    model, (x, w2c, text, history) = Mini(), inputs(batch=3)
    made = []
    for sigmas in (SIGMAS, [torch.full((3,), sigma) for sigma in SIGMAS]):
        with growing() as session, chunk(session, w2c) as one:
            step = next(iter(one.steps(sigmas)))
            made.append(
                step.velocity(
                    lambda x, s: model(x, torch.as_tensor(s).expand(3), w2c, text, history), x
                )
            )
    assert torch.allclose(*made, atol=1e-6)


def test_levels_that_differ_by_frame_are_refused_in_words_of_their_own():
    frames = [torch.tensor([sigma, sigma / 2]) for sigma in SIGMAS]
    with (
        growing() as session,
        pytest.raises(ValueError, match="got levels that differ between samples or frames"),
        chunk(session, inputs()[1]) as one,
    ):
        one.steps(frames)


def test_a_scheduler_whose_levels_rise_is_refused():
    class Inverted:
        timesteps, sigmas = torch.tensor([0, 250, 500, 750]), torch.tensor(SIGMAS[::-1])

        def step(self, *args):
            raise NotImplementedError

    with (
        growing() as session,
        pytest.raises(ValueError, match=r"levels that fall, .* got 0 and then 0.25; turn them"),
        chunk(session, inputs()[1]) as one,
    ):
        one.steps(Inverted())


def test_reused_steps_of_a_loop_that_calls_the_model_itself_are_answered_all_the_same():
    torch._dynamo.reset()
    model, (x, w2c, text, history) = Mini(), inputs()
    told = {**REUSE, "steps.reuse": (1,), "grow": True, "grow.steps": 1}
    fast = compiled(model, **told)

    def own_loop(session, x):
        with chunk(session, w2c) as one:
            for step in one.steps(SIGMAS):
                x = x - 0.25 * fast(x, level(step.sigma), w2c, text, history)
        return one

    with lipass.Session(preset="cache", **told) as session:
        with pytest.warns(LipassWarning, match="and none was"):
            one = own_loop(session, x)
        assert one.steps_skipped() == 1
        assert not one.why_missed


def test_attention_that_no_graph_shows_is_dense_there_too():
    q, k, v = torch.randn(3, 1, 2, 64, 16)
    past = torch.randn(2, 1, 2, 64, 16)
    told = {"sparse.tile": (1, 2, 2), "sparse.budget": 0.1, "sparse.dense_tokens": 0}
    segments = [("history", *past, (4, 4, 4)), ("current", k, v, (4, 4, 4))]
    views = {"poses": torch.eye(4).repeat(4, 1, 1), "query": torch.eye(4).repeat(4, 1, 1)}
    found = []
    with lipass.Session(preset="sparse", grow=True, **{"grow.steps": 1}, **told) as session:
        for coarse in (True, False):
            with session.chunk(**views, stream=str(coarse)) as one:
                one.coarse.running = coarse
                with registry.force("sparse"):
                    found.append(lipass.attend(q, segments, site="decode"))
                one.coarse.running = False
                one.coarse.taken.add(0)
    keys, values = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
    assert torch.allclose(found[0], expected, atol=1e-5)
    assert not torch.allclose(found[1], expected, atol=1e-3)
