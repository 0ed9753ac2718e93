"""Loops in which a scheduler takes the steps, and levels that are none."""

import diffusers
import pytest
import torch

import lipass
from lipass.passes.graph.marks import StepInputs
from lipass.policy.trajectory import parse_trajectory
from lipass.session import current_step

# diffusers makes arrays of tensors the way NumPy no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

W2C = parse_trajectory("left-15, right-16")
SIGMAS = (1.0, 0.9, 0.7, 0.4, 0.0)
LATENTS = StepInputs(names=("x",), parameters=(), conditions=(), levels=(), latents=(0,))
FLOW = {"num_train_timesteps": 1000, "shift": 3.0}


def scheduler_of(name):
    kind = getattr(diffusers, name)
    if name.startswith("FlowMatch"):
        return kind(**FLOW)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return kind(**flow) if name in ("UniPCMultistepScheduler",) else kind()


class Model:
    """Answer reused steps as a compiled model does."""

    def __init__(self):
        self.runs = 0

    def __call__(self, x):
        step = current_step()
        return self.compute((x,)) if step is None else step.call(self, LATENTS, (x,), self.compute)

    def compute(self, args):
        self.runs += 1
        return torch.sin(args[0]) + self.runs


def chunk_of(session, index=6):
    return session.chunk(poses=W2C[: 4 * index], query=W2C[4 * index : 4 * index + 4])


SCHEDULERS = [
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "DDIMScheduler",
    "LCMScheduler",
]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_takes_all_its_steps_and_ends_where_it_should(name):
    scheduler, model = scheduler_of(name), Model()
    scheduler.set_timesteps(5)
    x = torch.ones(1, 2, 2)
    with lipass.Session(preset="cache") as session, chunk_of(session) as chunk:
        for step, timestep in zip(chunk.steps(scheduler), scheduler.timesteps, strict=True):
            assert step.timestep == timestep
            x = scheduler.step(model(x), step.timestep, x, return_dict=False)[0]
    assert chunk.plan.steps.form == "lookup"
    assert chunk.plan.steps.reused == (1, 2, 3)
    assert (chunk.lookups, chunk.misses, model.runs) == (3, 0, 2)
    if getattr(scheduler, "step_index", None) is not None:
        assert scheduler.step_index == 5


def test_flow_matching_equals_the_merged_sigmas():
    scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler")
    scheduler.set_timesteps(5)
    x, y = torch.ones(1, 2, 2), torch.ones(1, 2, 2)
    with lipass.Session(preset="cache") as session:
        model = Model()
        with chunk_of(session) as chunk:
            for step in chunk.steps(scheduler):
                x = scheduler.step(model(x), step.timestep, x, return_dict=False)[0]
        model = Model()
        with chunk_of(session) as chunk:
            for step in chunk.steps(scheduler.sigmas):
                y = y + (step.sigma_next - step.sigma) * model(y)
    torch.testing.assert_close(x, y)


def test_steps_of_a_scheduler_have_its_sigmas():
    scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler")
    scheduler.set_timesteps(4)
    with chunk_of(lipass.Session(preset="cache")) as chunk:
        steps = list(chunk.steps(scheduler))
    assert [float(s.sigma) for s in steps] == scheduler.sigmas[:-1].tolist()
    assert float(steps[-1].sigma_next) == 0


def test_scheduler_that_calls_the_model_twice_a_step_reuses_none():
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    with chunk_of(lipass.Session(preset="cache")) as chunk:
        steps = list(chunk.steps(scheduler))
    assert not any(step.reused for step in steps)
    assert "computed: the scheduler calls the model 2 times a step" in chunk.plan.steps.reasons


def test_scheduler_without_timesteps_is_refused():
    session = lipass.Session(preset="cache")
    with (
        chunk_of(session) as chunk,
        pytest.raises(ValueError, match="DDIMScheduler without any; call its set_timesteps"),
    ):
        chunk.steps(diffusers.DDIMScheduler())


def test_scheduler_in_the_middle_of_its_steps_is_refused():
    scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler")
    scheduler.set_timesteps(4)
    scheduler.step(torch.ones(1, 2, 2), scheduler.timesteps[0], torch.ones(1, 2, 2))
    session = lipass.Session(preset="cache")
    with (
        chunk_of(session) as chunk,
        pytest.raises(ValueError, match="at step 1; call its set_timesteps for each chunk"),
    ):
        chunk.steps(scheduler)


def timesteps_of(name):
    scheduler = scheduler_of(name)
    scheduler.set_timesteps(5)
    return scheduler.timesteps


@pytest.mark.parametrize(
    "given",
    [
        *[pytest.param(lambda name=name: timesteps_of(name), id=name) for name in SCHEDULERS],
        pytest.param(lambda: timesteps_of("EulerDiscreteScheduler").tolist(), id="floats"),
        pytest.param(lambda: [1000, 750, 500, 250], id="ints"),
        pytest.param(lambda: [750, 500, 250, 0], id="ints that end with 0"),
        pytest.param(lambda: torch.tensor([999, 500, 0]), id="integer tensor"),
        pytest.param(lambda: timesteps_of("DDIMScheduler").numpy(), id="array"),
    ],
)
def test_timesteps_in_place_of_sigmas_are_refused(given):
    session = lipass.Session(preset="cache")
    with (
        chunk_of(session) as chunk,
        pytest.raises(ValueError, match=r"pass `chunk.steps\(scheduler\)`"),
    ):
        chunk.steps(given())


@pytest.mark.parametrize(
    "sigmas",
    [
        SIGMAS,
        torch.tensor(SIGMAS),
        (14.6, 5.0, 1.2, 0.3, 0.0),  # Karras
        torch.tensor([14.6, 5.0, 0.0]),
        (1, 0.5, 0),
        (1.0, 0.8, 0.6),  # ends in the middle, to go on elsewhere
        torch.tensor(SIGMAS, dtype=torch.float64).numpy(),
    ],
)
def test_sigmas_of_all_kinds_are_taken(sigmas):
    with lipass.Session(preset="off") as session, chunk_of(session) as chunk:
        assert len(list(chunk.steps(sigmas))) == len(sigmas) - 1


def test_what_is_neither_is_refused():
    session = lipass.Session(preset="cache")
    with (
        chunk_of(session) as chunk,
        pytest.raises(TypeError, match="sigmas or a scheduler, got int"),
    ):
        chunk.steps(4)
