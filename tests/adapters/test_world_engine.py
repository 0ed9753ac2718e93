"""world_engine: nothing can be left out of its loop, which stays exact and says why."""

import sys
from pathlib import Path

import pytest
import torch

import lipass

CONTRACT = Path(__file__).parent / "contracts" / "world_engine"
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called:UserWarning")


def test_an_unrolled_loop_over_a_ring_with_a_mask_of_data_stays_and_says_why(
    monkeypatch, fresh_dynamo
):
    monkeypatch.setattr(sys, "path", [str(CONTRACT), *sys.path])
    import frame_loop as loop

    torch.manual_seed(0)
    model = loop.Model().eval().requires_grad_(False)
    sigmas, draw = torch.tensor([1.0, 0.5, 0.0]), torch.randn(2, 1, 4, 4, 8)
    options = {"preset": "all", "inner": "eager"}
    fast = torch.compile(loop.denoise, backend="light_interaction", options=options)

    def frames(run):
        cache, made = loop.RingCache(2, 3, 32, 16), []
        for index, noise in enumerate(draw):
            frame = torch.tensor(index)
            made.append(run(model, noise, frame, cache, sigmas))
            model(made[-1], torch.zeros(1, 1, 1), frame, cache, False)
        return made

    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):  # as it sets
        assert all(
            torch.equal(*pair) for pair in zip(frames(fast), frames(loop.denoise), strict=True)
        )
    sites = lipass.report().sites.values()
    assert {one.action for one in sites} == {"kept"}
    assert all("masks its scores" in one.reason for one in sites)
