"""Residual gates: at threshold 0 the model itself, and nothing is kept from chunk to chunk."""

import pytest
import torch

from lipass.examples.tinyworld.model import TinyWorld, tokenize
from lipass.examples.tinyworld.residual_gates import RULES, GatedWorld
from lipass.examples.tinyworld.train_batches import prompt_of
from lipass.examples.tinyworld.world import Attributes

SIGMAS = (1.0, 0.9, 0.6, 0.3)


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    model = TinyWorld().eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    return model


def walked(called, model, chunks=1):
    """Return the velocities of all steps of some chunks."""
    made = []
    with torch.no_grad():
        text = model.text(tokenize(prompt_of(Attributes()))[None])
        for chunk in range(chunks):
            draw = torch.Generator().manual_seed(chunk)
            latents = torch.randn(1, model.config.latent_channels, 4, 8, 8, generator=draw)
            w2c = torch.eye(4).repeat(1, 6, 1, 1)
            clean = torch.randn(1, model.config.latent_channels, 2, 8, 8, generator=draw)
            history = called(clean, torch.zeros(1, 2), w2c, text)
            for sigma in SIGMAS:
                level = torch.full((1, 4), sigma)
                made.append(called(latents, level, w2c, text, history))
    return made


@pytest.mark.parametrize("rule", RULES)
def test_a_gate_that_never_closes_is_the_model(rule, world):
    gate = GatedWorld(world, rule, 0.0)
    assert all(map(torch.equal, walked(gate, world), walked(world, world)))
    assert (gate.computed, gate.calls) == (4, 4)


@pytest.mark.parametrize("rule", RULES)
def test_each_chunk_computes_its_first_step(rule, world):
    gate = GatedWorld(world, rule, 1e9)
    gated, plain = walked(gate, world, 2), walked(world, world, 2)
    assert (gate.computed, gate.calls) == (2, 8)
    for first in (0, 4):
        assert torch.equal(gated[first], plain[first])
        assert not torch.equal(gated[first + 1], plain[first + 1])


def test_teacache_adds_up_what_first_blocks_compare_at_once(world):
    few = {rule: GatedWorld(world, rule, 0.3) for rule in RULES}
    for gate in few.values():
        walked(gate, world)
    assert 1 < few["teacache"].computed < 4


def test_other_rules_are_refused(world):
    with pytest.raises(ValueError, match="rule must be one of teacache, first block, got 'mean'"):
        GatedWorld(world, "mean", 0.1)
