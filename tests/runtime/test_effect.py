"""Sessions in which nothing was left out, and are told so."""

import warnings

import pytest
import torch

import lipass
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import current_report

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

AWAY, BACK = parse_trajectory("w-40"), parse_trajectory("left-15, right-16")
SIGMAS = (1.0, 0.9, 0.7, 0.4, 0.0)


def roll_out(session, starts, poses=AWAY, *, sigmas=SIGMAS, given=True, call=None):
    """Run chunks that begin at these latents; returns what was warned of at the end."""
    if len(starts) == 1 and starts[0]:
        starts = starts * 3
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with session:
            for start in starts:
                history = poses[:start] if given and start else None
                with session.chunk(poses=history, query=poses[start : start + 4]) as chunk:
                    for step in chunk.steps(sigmas) if sigmas else ():
                        if call is not None:
                            call(chunk, step)
    return [str(w.message) for w in told if "must leave something out" in str(w.message)]


def test_exploring_is_named_as_the_cause():
    (one,) = roll_out(lipass.Session(preset="cache"), (4, 8, 12))
    assert "preset 'cache' left nothing out in 3 chunks: steps: exploring: no earlier view" in one
    assert one.endswith("mend the cause, or use preset 'exact'")
    assert current_report().table().splitlines()[0].startswith("session 1: preset 'cache' left")
    assert max(map(len, current_report().table().splitlines())) <= 80
    assert current_report().to_dict()["idle"]


@pytest.mark.parametrize(
    ("preset", "options", "cause"),
    [
        ("cache", {}, "steps: no cameras of a history were given"),
        ("context", {}, "context: no cameras of a history were given"),
    ],
)
def test_missing_cameras_are_named(preset, options, cause):
    (one,) = roll_out(lipass.Session(preset=preset, **options), (0, 4, 8, 12), given=False)
    assert cause in one


def test_short_context_is_named():
    (one,) = roll_out(lipass.Session(preset="context"), (0, 4, 4, 4))
    assert "context: short context, all of the 4 latents were kept" in one


def test_loop_that_asks_for_no_steps_is_named():
    (one,) = roll_out(lipass.Session(preset="cache"), (24,), BACK, sigmas=None)
    assert "no loop asked which steps to compute; use chunk.steps" in one


def test_model_that_is_not_compiled_is_named():
    (one,) = roll_out(lipass.Session(preset="sparse"), (16,))
    assert "sparse: no attention was seen in a compiled model" in one
    session = lipass.Session(preset="cache", **{"steps.form": "lookup"})
    (one,) = roll_out(session, (24,), BACK)
    assert "no call in a reused step was answered" in one


def test_every_section_has_its_cause():
    (one,) = roll_out(lipass.Session(preset="all"), (0, 4, 4, 4))
    assert all(f"{name}: " in one for name in ("context", "sparse", "steps"))


@pytest.mark.parametrize(
    ("preset", "starts", "poses"),
    [
        ("cache", (24,), BACK),
        ("context", (24,), BACK),
        ("all", (24,), BACK),
        ("off", (4, 8), AWAY),
        ("exact", (4, 8), AWAY),
        ("all", (0,), AWAY),
        ("all", (), AWAY),
    ],
    ids=["reused", "dropped", "both", "off", "exact", "first chunk only", "no chunk"],
)
def test_sessions_that_did_something_or_could_not_hear_nothing(preset, starts, poses):
    assert roll_out(lipass.Session(preset=preset), starts, poses) == []
    assert current_report().idle == []


def test_trial_of_two_chunks_is_left_to_the_receipt():
    assert roll_out(lipass.Session(preset="cache"), (0, 4, 8)) == []
    assert "left nothing out in 2 chunks" in current_report().table().splitlines()[0]


def test_session_that_failed_hears_nothing_more():
    session = lipass.Session(preset="cache")
    with pytest.raises(RuntimeError, match="lost"):  # noqa: PT012
        roll_out(session, (4,))
        with lipass.Session(preset="cache") as other:
            with other.chunk(poses=AWAY[:4], query=AWAY[4:8]):
                pass
            raise RuntimeError("lost")
    assert len(current_report().idle) == 1


def test_sparse_calls_are_something(mini_world, mini_world_inputs):
    from lipass.kernels import registry

    options = {"preset": "sparse", "sparse.budget": 0.2, "sparse.dense_tokens": 0}
    options["inner"] = "eager"
    fast = torch.compile(mini_world, backend="light_interaction", options=options)
    with torch.no_grad():
        for few in (4, 5):
            fast(*mini_world_inputs(few))

    def run(route):
        def call(chunk, step):
            with torch.no_grad(), registry.force(route):
                fast(*mini_world_inputs(16))

        return roll_out(lipass.Session(preset="sparse"), (16,), call=call)

    assert [len(run(route)) for route in ("sparse", "dense")] == [0, 1]
    assert "sparse: forced by registry.force" in current_report().idle[0]


def test_kept_sites_are_the_cause(mini_world, mini_world_inputs):
    options = {"preset": "sparse", "inner": "eager", "sparse.dense_layers": (0, 1)}
    fast = torch.compile(mini_world, backend="light_interaction", options=options)
    with torch.no_grad():
        for few in (4, 5):
            fast(*mini_world_inputs(few))

    def call(chunk, step):
        with torch.no_grad():
            fast(*mini_world_inputs(16))

    session = lipass.Session(preset="sparse", **{"sparse.dense_layers": (0, 1)})
    (one,) = roll_out(session, (16,), call=call)
    assert "is in dense_layers" in one
