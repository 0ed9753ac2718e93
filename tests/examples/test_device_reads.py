"""A rollout reads nothing back from the device inside of model calls, whatever the preset."""

import contextlib
from pathlib import Path

import pytest
import torch

import lipass
from lipass.examples.tinyworld.model import ModelConfig, TinyWorld, tokenize
from lipass.examples.tinyworld.rollout import roll_out
from lipass.passes import PIPELINES
from lipass.policy.trajectory import parse_trajectory
from lipass.testing import assert_no_device_reads, device_reads

# The gate may keep so small a model dense, of which a session tells.
pytestmark = pytest.mark.filterwarnings("ignore:an approximate session:lipass.LipassWarning")

TINY = ModelConfig(width=48, heads=1, blocks=2, rows=4, columns=4)
PATH = parse_trajectory("left-15, right-16", step_deg=6.0)
CAMERA = {"hfov_deg": 75.0, "vfov_deg": 75.0}
# Reads tensors that lie on the host only, which stand for those of a device here.
HOST_ONLY = ("lipass/runtime/inputs.py",)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tiny = TinyWorld(TINY)
    for parameter in tiny.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return tiny.eval().requires_grad_(False)


@pytest.fixture
def roll(model):
    """Roll out four chunks by a preset; `call` stands around each call of the model."""

    def run(preset, around, **options):
        torch._dynamo.reset()
        options = {"preset": preset, "inner": "eager", **options}
        if preset not in ("off", "exact", "sparse"):
            options |= CAMERA
        compiled = torch.compile(model, backend="light_interaction", options=options, dynamic=True)
        text = model.text(tokenize("a room")[None])
        given = torch.randn(16, 16, 4, 4, generator=torch.Generator().manual_seed(3))

        def call(*args):
            with around():
                return compiled(*args)

        with lipass.Session(**options) as session:
            return roll_out(call, text, given, PATH, seed=0, session=session)

    return run


# Another preset chooses by the cameras of video frames.
@pytest.mark.parametrize("preset", sorted({*PIPELINES} - {"reference-matrix-game"}))
def test_model_calls_read_nothing(preset, roll):
    def around():
        return assert_no_device_reads(host=True, allow=HOST_ONLY)

    rollout = roll(preset, around)
    assert len(rollout.chunks) == 4


def test_model_calls_read_nothing_where_steps_are_looked_up(roll):
    def around():
        return assert_no_device_reads(host=True, allow=HOST_ONLY)

    roll("all", around, **{"steps.form": "lookup"})
    assert any(c.lookups for c in lipass.report().chunks)


def test_read_in_the_model_would_be_seen(model, roll, monkeypatch):
    forward = TinyWorld.forward

    def reading(self, latents, *args):
        return forward(self, latents * latents.abs().max().item(), *args)

    monkeypatch.setattr(TinyWorld, "forward", reading)
    with pytest.raises(AssertionError, match=r"_local_scalar_dense at .*test_device_reads\.py"):
        roll("all", lambda: assert_no_device_reads(host=True))


def test_session_reads_poses_and_one_number_a_chunk(roll):
    with device_reads(host=True) as reads:
        rollout = roll("all", contextlib.nullcontext)
    folder = Path(lipass.__file__).parent
    # The loop itself takes noise and cameras to where the model is.
    own = [one for one in reads if one.where.startswith(str(folder))]
    assert {Path(one.where).parent for one in own} == {folder / "policy"}
    # What the rest of the policy reads is what has been brought to the host here.
    brought = [one.where for one in own if one.operator == "Tensor.to"]
    assert len(brought) == len(rollout.chunks)
    assert "views.py" in brought[0]
    assert len(set(brought)) == 1
