"""A rollout of the streaming model whose history is merged at a threshold that changes nothing."""

import itertools

import pytest
import torch

import lipass
from lipass.examples.tinyworld.model import CHUNK_LATENTS, ModelConfig, tokenize
from lipass.examples.tinyworld.rollout import SIGMAS, chunk_noise
from lipass.examples.tinyworld.stream import StreamWorld
from lipass.examples.tinyworld.stream_rollout import GrownCache
from lipass.policy.trajectory import parse_trajectory
from lipass.testing import assert_no_device_reads

TINY = ModelConfig(width=48, heads=2, blocks=1, rows=4, columns=4)
CHUNKS = 16
PATH = parse_trajectory("w-8,left-60", step_deg=9.0)[None, : CHUNKS * CHUNK_LATENTS]

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def model(untrained_stream) -> StreamWorld:
    return untrained_stream(TINY)


@pytest.fixture(scope="module")
def text(model):
    return model.text(tokenize("a room at dusk")[None])


class Rollout:
    """A rollout that goes on chunk by chunk; the first chunk is given."""

    def __init__(self, model, text, session=None):
        self.model, self.text, self.session = model, text, session
        self.cache, self.made = GrownCache(), []

    @torch.no_grad()
    def chunk(self, n):
        here = slice(n * CHUNK_LATENTS, (n + 1) * CHUNK_LATENTS)
        if self.session is None:
            self._steps(here)
            return
        before = PATH[0, : here.start] if n else None
        with self.session.chunk(poses=before, query=PATH[0, here]):
            self._steps(here)

    def _steps(self, here):
        def run(x, sigma, refresh):
            level = torch.full((1, CHUNK_LATENTS), sigma)
            call = (self.model, x, level, PATH[:, here], self.text)
            return self.cache.forward(*call, walls=None, refresh=refresh)

        x = chunk_noise(1, here.start, (1, 16, CHUNK_LATENTS, TINY.rows, TINY.columns))
        for sigma, after in itertools.pairwise(SIGMAS) if here.start else ():
            x = x + (after - sigma) * run(x, sigma, False)
        run(x, 0.0, True)
        self.made.append(x)

    def all(self):
        for n in range(CHUNKS):
            self.chunk(n)
        return torch.cat(self.made, 2)


def test_at_threshold_1_a_rollout_is_that_of_eager(model, text):
    """Nothing is compiled after warm-up while the cache grows, and no tensor is read."""
    plain = Rollout(model, text).all()
    options = {"preset": "exact", "inner": "eager", "merge": True, "merge.threshold": 1.0}
    fast = torch.compile(model, backend="light_interaction", options=options, dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]
    with lipass.Session(preset="exact") as session:
        rollout = Rollout(fast, text, session)
        for n in range(3):
            rollout.chunk(n)
        warm = graphs["unique_graphs"]
        with assert_no_device_reads(allow=["lipass/policy/", "lipass/runtime/given"]):
            for n in range(3, CHUNKS):
                rollout.chunk(n)
        assert session.histories.anew == TINY.blocks
        assert session.histories.added == TINY.blocks * (CHUNKS - 2)
    assert torch.allclose(torch.cat(rollout.made, 2), plain, rtol=1e-4, atol=1e-4)
    assert graphs["unique_graphs"] == warm
