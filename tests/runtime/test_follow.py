"""The loop of a pipeline that nobody can edit is the loop of a chunk, by its scheduler."""

import copy

import pytest
import torch

import lipass

TURN = torch.tensor([*range(12), *range(12, 0, -1)]) * 0.15
VIEWS = torch.eye(4).repeat(24, 1, 1)
VIEWS[:, 0, 0] = VIEWS[:, 2, 2] = TURN.cos()
VIEWS[:, 0, 2], VIEWS[:, 2, 0] = TURN.sin(), -TURN.sin()


class Scheduler:
    """Counts its steps, as schedulers of diffusers do."""

    def __init__(self):
        self.timesteps = None
        self.step_index = None

    def set_timesteps(self, steps):
        self.timesteps = torch.linspace(1000, 250, steps)
        self.sigmas = torch.cat([self.timesteps / 1000, torch.zeros(1)])
        self.num_inference_steps, self.step_index = steps, None

    def step(self, velocity, timestep, sample):
        self.step_index = (self.step_index or 0) + 1
        return sample - 0.25 * velocity


@pytest.fixture
def chunk():
    """Yield an open chunk that comes back to what was seen, so that its middle is reused."""
    with (
        lipass.Session(preset="cache") as session,
        session.chunk(poses=VIEWS[:16], query=VIEWS[16:20]) as chunk,
    ):
        yield chunk


def pipeline(scheduler, chunk, steps=4):
    """Return what each call of the model saw of its step."""
    seen, x = [], torch.zeros(1)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        seen.append((chunk.active.index, chunk.active.reused))
        x = scheduler.step(x, t, x)
    return seen


def test_calls_belong_to_the_step_of_the_scheduler(chunk):
    scheduler = Scheduler()
    with chunk.follow(scheduler):
        seen = pipeline(scheduler, chunk)
    assert seen == [(0, False), (1, True), (2, True), (3, False)]
    assert chunk.active is None
    assert vars(scheduler).keys().isdisjoint({"step", "set_timesteps"})


def test_behind_the_last_step_no_call_belongs_to_one(chunk):
    scheduler = Scheduler()
    with chunk.follow(scheduler):
        pipeline(scheduler, chunk)
        assert chunk.active is None


def test_a_second_loop_begins_with_its_timesteps(chunk):
    scheduler = Scheduler()
    with chunk.follow(scheduler):
        scheduler.set_timesteps(4)
        scheduler.step(0, 0, 0)
        assert [index for index, _ in pipeline(scheduler, chunk)] == [0, 1, 2, 3]


def test_an_error_in_the_loop_leaves_the_scheduler_as_it_was(chunk):
    def fail(scheduler):
        with chunk.follow(scheduler):
            scheduler.set_timesteps(4)
            raise RuntimeError("mine")

    scheduler = Scheduler()
    with pytest.raises(RuntimeError, match="mine"):
        fail(scheduler)
    assert "step" not in vars(scheduler)
    assert chunk.active is None


def test_copies_of_a_scheduler_step_themselves_and_it_is_told(chunk):
    def run(scheduler):
        with chunk.follow(scheduler):
            scheduler.set_timesteps(4)
            other = copy.deepcopy(scheduler)
            other.step(0, 0, 0)
            assert (other.step_index, scheduler.step_index) == (1, None)
            assert chunk.active.index == 0

    with pytest.warns(lipass.LipassWarning, match="steps copies of it, so every step was"):
        run(Scheduler())


def test_a_scheduler_is_followed_once_at_a_time(chunk):
    scheduler = Scheduler()
    with chunk.follow(scheduler), pytest.raises(ValueError, match="once at a time"):
        chunk.follow(scheduler).__enter__()


def test_sigmas_are_no_scheduler(chunk):
    with pytest.raises(TypeError, match=r"got list without set_timesteps; pass pipe\.scheduler"):
        chunk.follow([1.0, 0.0])
