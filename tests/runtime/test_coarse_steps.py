"""What a session has computed on half of the grid, and what it leaves as it was."""

import itertools
import warnings

import pytest
import torch
from mini_decode import REUSE, SIGMAS, Mini, chunk, compiled, inputs, level

import lipass
from lipass.errors import LipassError, LipassWarning
from lipass.policy.plan import ChunkPlan
from lipass.runtime.steps import StepSequence


class Seen(Mini):
    """A model that tells which grids it was called on, and at which levels."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, sigma, w2c, text, history):
        self.calls.append((tuple(x.shape[-2:]), round(float(sigma), 4)))
        return super().forward(x, sigma, w2c, text, history)


def growing(preset="off", **told):
    return lipass.Session(
        preset=preset, grow=True, **{name.replace("__", "."): one for name, one in told.items()}
    )


def sample(model, session, sigmas=SIGMAS, given=None, stream="main"):
    """Denoise one chunk; return its latents."""
    x, w2c, text, history = given or inputs()
    with chunk(session, w2c, stream=stream) as one:
        for step in one.steps(sigmas):
            v = step.velocity(lambda x, sigma: model(x, level(sigma), w2c, text, history), x)
            x = x + (step.sigma_next - step.sigma) * v
    return x


def plain(model, sigmas=SIGMAS):
    x, w2c, text, history = inputs()
    for sigma, after in itertools.pairwise(sigmas):
        x = x + (after - sigma) * model(x, level(sigma), w2c, text, history)
    return x


@pytest.mark.parametrize(
    "told",
    [{}, {"grow__delta": 0.0, "grow__spectrum": (1.0, 2.0), "grow__grid": (4, 4)}],
    ids=["on alone", "no tolerance"],
)
def test_without_tolerance_the_result_is_that_of_the_plain_model_to_the_bit(told):
    model = Seen()
    with growing(**told) as session:
        made = sample(model, session)
    assert {grid for grid, _ in model.calls} == {(4, 4)}
    assert torch.equal(made, plain(model))
    assert lipass.report().chunks[-1].coarse_steps == 0


def test_first_steps_are_called_on_half_of_the_grid_at_its_own_levels():
    model = Seen()
    with growing(grow__steps=2) as session:
        sample(model, session)
    assert model.calls == [
        ((2, 2), 1.0), ((2, 2), 0.6), ((4, 4), 0.5), ((4, 4), 0.25),
    ]  # fmt: skip
    record = lipass.report().chunks[-1]
    assert (record.coarse_steps, record.plan.steps.coarse) == (2, (0, 1))
    assert "2 of 4 steps on half of the grid" in lipass.report().table()


def test_a_tolerance_decides_by_the_spectrum():
    told = {"grow__spectrum": (0.2, 2.0), "grow__grid": (4, 4)}
    counts = []
    for delta in (0.001, 0.05, 0.5):
        with growing(grow__delta=delta, **told) as session:
            sample(Mini(), session)
        counts.append(lipass.report().chunks[-1].coarse_steps)
    # They end at 0.75, 0.5 and 0.25; the switches are 0.94, 0.68 and 0.35.
    assert counts == [0, 1, 2]


def test_plans_are_recorded_and_replayed_without_options():
    model = Mini()
    with growing(grow__steps=2) as session:
        made = sample(model, session)
    plan = ChunkPlan.from_json(lipass.report().chunks[-1].plan.to_json())
    assert plan.steps.coarse == (0, 1)
    with lipass.Session.replay([plan]) as again:
        assert torch.equal(sample(model, again), made)


@pytest.mark.parametrize("reuse", [(1,), (1, 2)])
def test_a_step_that_is_reused_is_not_called_and_looked_up_is_merged(reuse):
    results, model = [], Seen()
    for form in ("merge", "lookup"):
        told = {**REUSE, "steps.form": form, "steps.reuse": reuse, "grow.steps": 1}
        model.calls.clear()
        with lipass.Session(preset="cache", grow=True, **told) as session:
            results.append(sample(model, session))
        record = lipass.report().chunks[-1]
        # Those that are reused behind one on the whole grid would be answered by a compiled model.
        assert [grid for grid, _ in model.calls] == [(2, 2)] + [(4, 4)] * (3 - len(reuse))
        assert record.steps_skipped == len(reuse)
        assert record.coarse_steps == (1 + len(reuse) if form == "lookup" else 1)
    assert torch.allclose(*results, atol=1e-4)


def test_several_calls_of_a_step_are_not_taken_for_each_other():
    model, (x, w2c, text, history) = Seen(), inputs()
    told = {**REUSE, "steps.form": "lookup", "steps.reuse": (1,), "grow.steps": 1}
    with lipass.Session(preset="cache", grow=True, **told) as session, chunk(session, w2c) as one:
        for step in itertools.islice(one.steps(SIGMAS), 2):
            found = [
                step.velocity(lambda x, s, t=t: model(x, level(s), w2c, t, history), x)
                for t in (text, -text)
            ]
            assert not torch.equal(*found)
    assert len(model.calls) == 4


@pytest.mark.parametrize("preset", ["off", "exact"])
def test_compiled_it_is_one_graph_more_and_the_same_as_eager(preset):
    torch._dynamo.reset()
    model, options = Mini(), {"grow": True, "grow.steps": 2}
    fast = compiled(model, preset, **options)
    graphs = []
    with lipass.Session(preset=preset, **options) as session:
        for number in range(3):
            found = sample(fast, session, stream=f"s{number}")
            graphs.append(lipass.report().graphs)
    with growing(grow__steps=2) as eager:
        expected = sample(model, eager)
    assert graphs[0] == graphs[1] == graphs[2] > 0
    assert torch.allclose(found, expected, atol=1e-5)


def test_attention_of_sparse_graphs_is_dense_on_half_of_the_grid():
    torch._dynamo.reset()
    options = {"sparse.tile": (1, 2, 2), "sparse.budget": 0.3, "sparse.dense_tokens": 0}
    options |= {"grow": True, "grow.steps": 2}
    model = Mini()
    fast = compiled(model, "sparse", **options)
    x, w2c, text, history = inputs()
    with lipass.Session(preset="sparse", **options) as session, chunk(session, w2c) as one:
        step = next(one.steps(SIGMAS))
        found = step.velocity(lambda x, s: fast(x, level(s), w2c, text, history), x)
    with growing(grow__steps=2) as session, chunk(session, w2c) as one:
        step = next(one.steps(SIGMAS))
        expected = step.velocity(lambda x, s: model(x, level(s), w2c, text, history), x)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_scheduler_that_takes_all_steps_may_have_some_on_half_of_the_grid():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    model, (x, w2c, text, history) = Seen(), inputs()
    with growing(grow__steps=2) as session, chunk(session, w2c) as one:
        for step in one.steps(scheduler):
            v = step.velocity(lambda x, s: model(x, level(s), w2c, text, history), x)
            x = scheduler.step(v, step.timestep, x).prev_sample
    assert [grid for grid, _ in model.calls] == [(2, 2)] * 2 + [(4, 4)] * 2


def test_a_loop_that_calls_the_model_itself_is_told_once():
    model, (x, w2c, text, history) = Mini(), inputs()

    def own_loop(session, stream):
        with chunk(session, w2c, stream=stream) as one:
            for step in one.steps(SIGMAS):
                model(x, level(step.sigma), w2c, text, history)

    with growing(grow__steps=2) as session:
        with pytest.warns(LipassWarning, match="2 of 4 steps were planned so, and none was"):
            own_loop(session, "first")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            own_loop(session, "second")


def test_under_strict_it_is_an_error():
    with lipass.Session(preset="off", strict=True, grow=True, **{"grow.steps": 2}) as session:
        one = chunk(session, inputs()[1])
        with pytest.raises(LipassError, match="no loop asked for its steps"), one:
            pass


def test_nothing_is_told_where_nothing_was_asked_for(recwarn):
    with growing() as session:
        sample(Mini(), session)
    with lipass.Session(preset="off") as session:
        sample(Mini(), session)
    assert not [one for one in recwarn if issubclass(one.category, LipassWarning)]
    assert lipass.report().chunks[-1].plan.steps.coarse is None
    assert "half of the grid" not in lipass.report().table().splitlines()[-1]


def test_switched_off_it_is_the_plain_model():
    model = Seen()
    with growing(grow__steps=2) as session, lipass.disabled():
        made = sample(model, session)
    assert {grid for grid, _ in model.calls} == {(4, 4)}
    assert torch.equal(made, plain(model))


def test_another_grid_than_that_of_the_options_is_refused():
    told = {"grow__delta": 0.9, "grow__spectrum": (0.2, 2.0), "grow__grid": (8, 8)}
    words = r"got \(8, 8\) for latents of \(4, 4\); write 'grow.grid': \(4, 4\)"
    with growing(**told) as session, pytest.raises(ValueError, match=words):
        sample(Mini(), session)


class Timed:
    """A scheduler that knows no noise levels."""

    timesteps = torch.tensor([999, 500])

    def step(self, *args):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        ((80.0, 10.0, 0.0), "levels of flow matching, in 0..1, got 80; pass sigmas"),
        (Timed(), "one noise level a step, got a scheduler without sigmas; pass a list"),
    ],
)
def test_levels_that_say_nothing_are_refused(sigmas, words):
    with (
        growing(grow__steps=1) as session,
        pytest.raises(ValueError, match=words),
        chunk(session, inputs()[1]) as one,
    ):
        one.steps(sigmas)


def test_a_sequence_of_steps_says_which_are_on_half_of_the_grid():
    with growing(grow__steps=1) as session, chunk(session, inputs()[1]) as one:
        sequence = one.steps(SIGMAS)
        assert isinstance(sequence, StepSequence)
        assert [step.coarse for step in sequence] == [True, False, False, False]
        one.coarse.taken.add(0)  # nothing is called here
