"""What calls of a compiled model read, beside what the session decided."""

import math
import warnings

import pytest
import torch

import lipass
from lipass.kernels import registry
from lipass.receipt import current_report

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

HISTORY = 24
NARROW = {"context.window_chunks_max": 1}


def turning(count):
    """Cameras that turn by 15 degrees a latent, so that few of them show the same."""
    w2c = torch.eye(4).repeat(1, count, 1, 1)
    angle = torch.arange(count) * math.radians(15)
    w2c[0, :, 0, 0] = w2c[0, :, 2, 2] = angle.cos()
    w2c[0, :, 2, 0], w2c[0, :, 0, 2] = angle.sin(), -angle.sin()
    return w2c


@pytest.fixture
def call(mini_world, mini_world_inputs):
    """Return a function that calls a compiled model inside a chunk, behind n history latents."""
    compiled = {}

    def run(preset, session, n=HISTORY, *, w2c=None, latents=None, **options):
        key = (preset, *options.items())
        if key not in compiled:
            given = {"preset": preset, "inner": "eager", **options}
            fast = torch.compile(mini_world, backend="light_interaction", options=given)
            compiled[key] = fast
            with torch.no_grad():
                for few in (2, 3):
                    fast(*mini_world_inputs(few))
        x, _, text, history = mini_world_inputs(latents or n)
        cameras = turning(n + 4)
        inside = turning((latents or n) + 4) if w2c is None else w2c
        registry.reset_telemetry()
        with (
            session.chunk(poses=cameras[0, :n], query=cameras[0, n:]) as chunk,
            torch.no_grad(),
        ):
            out = compiled[key](x, inside, text, history)
        return chunk, out

    return run


def dropped():
    return sum(counts.dropped_latents for counts in registry.telemetry().values())


def test_graph_leaves_out_what_the_session_did_not_choose(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error", lipass.LipassWarning)
        with lipass.Session(preset="context", **NARROW) as session:
            chunk, _ = call("context", session, **NARROW)
    assert len(chunk.context) < HISTORY
    assert dropped() == 2 * (HISTORY - len(chunk.context))
    record = current_report().chunks[-1]
    assert record.latents_read == len(chunk.context)


def test_graph_that_leaves_out_equals_the_model_on_what_was_chosen(
    call, mini_world, mini_world_inputs
):
    with lipass.Session(preset="context", **NARROW) as session:
        chunk, out = call("context", session, **NARROW)
    x, _, text, history = mini_world_inputs(HISTORY)
    kept = history.unflatten(2, (HISTORY, 16))[:, :, chunk.context].flatten(2, 3)
    w2c = turning(HISTORY + 4)[:, [*chunk.context, *range(HISTORY, HISTORY + 4)]]
    with torch.no_grad():
        torch.testing.assert_close(out, mini_world(x, w2c, text, kept), atol=1e-5, rtol=1e-5)


def test_model_that_reads_all_is_told_where_the_graph_cannot_leave_out(call):
    with lipass.Session(preset="context", **NARROW) as session:
        with pytest.warns(lipass.LipassWarning, match="reads 24 where .* of 24 were chosen"):
            call("exact", session)
        with warnings.catch_warnings():
            warnings.simplefilter("error", lipass.LipassWarning)
            call("exact", session)  # once is enough
    record = current_report().chunks[-1]
    assert record.latents_read == HISTORY
    rows = [line for line in current_report().table().splitlines() if line.startswith("1.main")]
    assert rows[0].split()[2:4] == [f"{len(record.plan.context.indices)}/24", "24"]


def test_model_that_reads_what_was_chosen_hears_nothing(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error", lipass.LipassWarning)
        with lipass.Session(preset="context", **NARROW) as session:
            n = len(session.chunk(poses=turning(24)[0], query=turning(28)[0, 24:]).context)
            chunk, _ = call("exact", session, latents=n)
    assert len(chunk.context) == n


def test_strict_raises_where_the_choice_is_ignored(call):
    with lipass.Session(preset="context", strict=True, **NARROW) as session:
        for _ in range(2):  # who tries again is refused again
            with pytest.raises(lipass.LipassError, match="strict: a model must read"):
                call("exact", session)


def test_strict_refuses_a_session_of_other_options_each_time(call):
    with lipass.Session(preset="sparse", strict=True) as session:
        for _ in range(2):
            with pytest.raises(lipass.LipassError, match="strict: a compiled model and its"):
                call("exact", session)


def test_cameras_that_are_none_are_refused_each_time(call):
    wrong = turning(HISTORY + 4) * 2
    with lipass.Session(preset="cache") as session:
        for _ in range(2):
            with pytest.raises(ValueError, match="the model chooses its context by its input"):
                call("context", session, w2c=wrong, **NARROW)


def test_options_that_nobody_reads_are_told_once(call):
    with warnings.catch_warnings(record=True) as told, lipass.Session(preset="all") as session:
        warnings.simplefilter("always")
        call("cache", session, 4, **{"steps.reuse": (1,)})
        call("cache", session, 4, **{"steps.reuse": (1,)})
    (one,) = [str(w.message) for w in told if "same options" in str(w.message)]
    assert "steps.reuse: (1,) in the graph, middle in the session" in one
    assert "sparse: on in the session, not in the graph" in one
    assert one.endswith("give both the same options")


def test_options_that_nobody_reads_raise_under_strict(call):
    with (
        lipass.Session(preset="all", strict=True) as session,
        pytest.raises(lipass.LipassError, match=r"strict: .*steps\.reuse"),
    ):
        call("cache", session, 4, **{"steps.reuse": (1,)})


def test_cameras_of_a_graph_that_chooses_by_them_are_checked(call):
    w2c = turning(HISTORY + 4)
    w2c[0, 5, :3, :3] *= 2
    with (
        lipass.Session(preset="cache") as session,
        pytest.raises(ValueError, match=r"by its input w2c.*rigid .* at latent 5"),
    ):
        call("context", session, w2c=w2c)
