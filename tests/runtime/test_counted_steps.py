"""The receipt counts the steps that were computed, whatever was planned."""

import pytest
import torch
from mini_decode import REUSE, SIGMAS, Mini, compiled, inputs, level

import lipass
from lipass.policy.trajectory import parse_trajectory

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

W2C = parse_trajectory("left-15, right-16")


class Counting(Mini):
    """Counts in Python, which no compiled graph does: for models that are not compiled."""

    ran = 0

    def forward(self, *args):
        self.ran += 1
        return super().forward(*args)


class Filling(Mini):
    """Writes its keys to a cache at each call."""

    def forward(self, x, sigma, w2c, text, history):
        history[:, :, -1:] = sigma.mean()
        return super().forward(x, sigma, w2c, text, history)


def chunk_of(session):
    return session.chunk(poses=W2C[:24], query=W2C[24:28])


def roll_out(model, form):
    options = {**REUSE, "steps.form": form}
    given = inputs(24)
    with lipass.Session(preset="cache", **options) as session, chunk_of(session) as chunk:
        for step in chunk.steps(SIGMAS):
            model(given[0] + 0.01 * step.index, level(step.sigma), *given[1:])
    (record,) = lipass.report().chunks
    (line,) = [text for text in lipass.report().table().splitlines() if "1.main" in text]
    return record, line.split(), lipass.report().table()


@torch.no_grad()
def test_answered_steps_were_not_computed():
    record, line, _ = roll_out(compiled(Mini().eval()), "lookup")
    assert record.lookups == record.steps_skipped == len(record.plan.steps.reused) == 2
    assert "2/4" in line


@torch.no_grad()
def test_steps_of_a_model_that_writes_to_its_cache_were_computed():
    record, line, table = roll_out(compiled(Filling().eval()), "lookup")
    assert record.steps_skipped == 0 < len(record.plan.steps.reused)
    assert "4/4" in line
    assert "2 of them computed all the same: it is not pure" in table


@torch.no_grad()
def test_taken_steps_of_a_graph_that_answers_none_were_computed():
    """A scheduler takes every step, so the graph would have to answer the reused ones."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    options = {"preset": "sparse", "inner": "eager"}
    model = torch.compile(Mini().eval(), backend="light_interaction", options=options)
    given, merged = inputs(24), {**REUSE, "steps.form": "merge"}
    with lipass.Session(preset="cache", **merged) as session, chunk_of(session) as chunk:
        for step in chunk.steps(scheduler):
            model(given[0], level(step.sigma), *given[1:])
    (record,) = lipass.report().chunks
    assert record.steps_skipped == 0 < len(record.plan.steps.reused)
    told = " ".join(lipass.report().table().split())
    assert "graphs of 'sparse' answer none; compile with the options of the session" in told


@torch.no_grad()
def test_steps_of_a_model_that_is_not_compiled_were_computed():
    model = Counting().eval()
    record, line, table = roll_out(model, "lookup")
    assert (model.ran, record.steps_skipped) == (4, 0)
    assert "4/4" in line
    assert "no compiled call was in a reused step" in table


@torch.no_grad()
@pytest.mark.parametrize("kind", [Counting, Filling])
def test_merged_steps_are_not_computed_by_any_model(kind):
    model = kind().eval()
    record, line, _ = roll_out(model if kind is Counting else compiled(model), "merge")
    assert record.steps_skipped == 2
    assert "2/4" in line
    assert kind is Filling or model.ran == 2


@torch.no_grad()
def test_step_that_is_answered_in_part_was_computed():
    model = compiled(Mini().eval())
    given, other = inputs(24), inputs(24, seed=1)
    with lipass.Session(preset="cache", **REUSE) as session, chunk_of(session) as chunk:
        for step in chunk.steps(SIGMAS):
            model(given[0], level(step.sigma), *given[1:])
            if step.reused:
                model(other[0], level(step.sigma), *other[1:])
    (record,) = lipass.report().chunks
    # The second reused step is answered in full: the first one kept what it had to compute.
    assert (record.lookups, record.misses, record.steps_skipped) == (3, 1, 1)
