"""Trials of what samples: each loss gives a gradient and latents, in any number of steps."""

import pytest
import torch

from benchmarks import sampler_trials
from benchmarks.sampler_trials import CODES, LOSSES, Trial, codebook, levels, train
from lipass.examples.tinyworld.imagined import STEPS


@pytest.fixture
def latents(monkeypatch):
    monkeypatch.setattr(sampler_trials, "_BATCH", 4)
    return torch.randn(40, 16, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_trains_and_draws_in_any_number_of_steps(loss, latents):
    torch.manual_seed(0)
    trial = Trial(loss, latents)
    before = [p.clone() for p in trial.parameters]
    assert train(trial, latents, latents, seconds=0.05) > 0
    # A level or a place that nothing hangs on yet may stay.
    assert any(not torch.equal(a, b) for a, b in zip(before, trial.parameters, strict=True))
    for sigmas in STEPS.values():
        drawn = trial.sample(latents[:3], sigmas)
        assert drawn.shape == (3, 16, 8, 8)
        assert drawn.isfinite().all()


def test_all_places_of_codes_are_revealed(latents):
    trial = Trial("codes", latents)
    drawn = trial.sample(latents[:2], STEPS[4]).flatten(2).mT.flatten(0, 1)
    assert float(torch.cdist(drawn, trial.codebook).amin(1).max()) < 0.1


def test_a_codebook_finds_what_there_is():
    kinds = torch.randn(CODES // 16, 16, generator=torch.Generator().manual_seed(0)) * 5
    latents = kinds[torch.arange(64 * 40) % len(kinds)].view(40, 64, 16).mT.unflatten(2, (8, 8))
    centres = codebook(latents, torch.Generator().manual_seed(0))
    assert float(torch.cdist(kinds, centres).amin(1).max()) < 0.1


def test_the_energy_of_a_spread_that_fits_is_less_than_that_of_its_mean(latents):
    """Why it samples: two draws of what there is cost less than its mean said twice."""
    y = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)[:, None, None, None]
    y = y.expand(-1, 16, 8, 8)

    def energy(said: list[torch.Tensor]) -> float:
        trial = Trial("energy", latents)
        trial._clean = lambda *_: said.pop()
        return float(trial.step(y, y))

    generator = torch.Generator().manual_seed(0)
    drawn = [y[torch.randperm(64, generator=generator)] for _ in "ab"]
    assert energy(drawn) < energy([torch.zeros_like(y)] * 2)


def test_levels_of_trials_are_in_range():
    drawn = levels(1000, torch.Generator().manual_seed(0))
    assert 0.3 - 1e-6 <= float(drawn.min()) < float(drawn.max()) == 1.0
