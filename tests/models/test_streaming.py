"""Streams from a cache go with all passes, and with each at its exact setting."""

import pytest
import torch
from streaming_zoo import STREAMS, forget_checkout

import lipass
from lipass.config import Config
from lipass.kernels import registry
from lipass.receipt import report

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:an approximate session must leave something out"),
]

EXACT_SETTINGS = {
    "sparse-attention": {"preset": "sparse", "sparse.budget": 1.0},
    "prune-context": {"preset": "context", "context.window_chunks_max": 99,
                      "context.window_chunks_min": 98},
    "guard-steps": {"preset": "cache", "steps.reuse": ()},
}  # fmt: skip
"""Each pass that may leave something out, with options at which it leaves out nothing."""

APPROXIMATE = ("all",)
"""Presets with which every stream goes."""


@pytest.fixture(scope="module", autouse=True)
def checkout():
    """Yield nothing; what a miniature checkout has imported is forgotten behind the tests."""
    yield
    forget_checkout()


def options_of(stream, **more):
    """Return those options of a stream whose section the preset has."""
    config = Config.resolve(more["preset"])
    on = {name for name in ("context", "sparse", "steps") if getattr(config, name)}
    kept = {
        key: value
        for key, value in stream.options.items()
        if (key.partition(".")[0] in on if "." in key else on & {"context", "steps"})
    }
    return {**kept, **more}


def rolled(stream, options):
    """Roll a stream out; return its latents and how many graphs there were behind each chunk."""
    graphs, made = [], []
    with (
        stream.opened({**options, "inner": "eager"}) as roll,
        lipass.Session(**options) as session,
        registry.force("sparse", "a test takes the sparse kernel"),
    ):
        for latents in roll(session):
            made.append(latents)
            graphs.append(report().graphs)
    return made, graphs


@pytest.mark.parametrize("preset", APPROXIMATE)
@pytest.mark.parametrize("name", STREAMS)
def test_stream_goes_with_a_preset(name, preset):
    stream = STREAMS[name]
    made, graphs = rolled(stream, options_of(stream, preset=preset))
    assert all(one.isfinite().all() for one in made)
    assert len(list(report().chunks)) == stream.chunks
    assert graphs[stream.settled :] == [graphs[-1]] * (stream.chunks - stream.settled)
    assert not report().left_eager
    assert all(site.action and site.reason for site in report().sites.values())
    if preset in ("context", "all"):
        assert any(frame.reason.startswith("dropped") for one in report().chunks
                   for frame in one.plan.context.frames)  # fmt: skip
        read = [one.latents_read for one in report().chunks][1:]
        chosen = [len(one.plan.context.indices) for one in report().chunks][1:]
        assert read == chosen


@pytest.mark.parametrize("setting", EXACT_SETTINGS)
@pytest.mark.parametrize("name", ["tinyworld, ring"])
def test_pass_at_its_exact_setting_equals_eager(name, setting):
    stream = STREAMS[name]
    with stream.opened(None) as roll:
        expected = list(roll(None))
    options = options_of(stream, **EXACT_SETTINGS[setting])
    made, _ = rolled(stream, options)
    sites = [one for one in report().sites.values() if one.role == "decode"]
    assert sites
    assert all(one.action and one.reason for one in sites)
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
