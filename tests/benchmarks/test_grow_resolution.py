"""What the benchmark of steps on half of the grid compares is what it says."""

import torch

from benchmarks.grow_resolution import (
    GRIDS,
    known_latents,
    left_of_noise,
    levels,
    powers,
    weighing,
)
from lipass.examples.tinyworld.model import ModelConfig, TinyWorld


def test_a_sampler_of_known_latents_reaches_them():
    power = powers((8, 12))
    made = left_of_noise(power, levels(2000), ())
    assert torch.allclose(made.square(), power, rtol=0.05)


def test_frequencies_that_half_of_the_grid_has_are_not_touched_by_it():
    power, sigmas = powers((8, 12)), levels(20)
    whole, half = (left_of_noise(power, sigmas, coarse) for coarse in ((), range(5)))
    high = 8 * 12 * 3 // 4
    assert torch.equal(whole[high:], half[high:])
    assert not torch.equal(whole[:high], half[:high])


def test_nothing_is_predicted_of_pure_noise_so_one_step_on_half_of_the_grid_is_the_same():
    power, sigmas = powers((8, 12)), levels(20)
    assert torch.equal(*(left_of_noise(power, sigmas, coarse) for coarse in ((), (0,))))


@torch.no_grad()
def test_a_weighing_model_is_the_model_on_the_whole_grid():
    config = ModelConfig(rows=4, columns=4, width=64, heads=1, blocks=1)
    torch.manual_seed(0)
    model = TinyWorld(config)
    for block in model.blocks:
        torch.nn.init.normal_(block.proj.weight)
    torch.nn.init.normal_(model.head.weight)
    own = weighing(model)
    text = model.text(torch.zeros(1, 32, dtype=torch.long))
    poses = torch.eye(4).repeat(1, 6, 1, 1)
    clean = torch.randn(1, 16, 2, 4, 4)
    history = model(clean, torch.zeros(1, 2), poses, text)
    for rows, same in ((4, True), (2, False)):
        x = torch.randn(1, 16, 4, rows, rows)
        a, b = (one(x, torch.ones(1, 4), poses, text, history) for one in (model, own))
        assert torch.equal(a, b) == same


def test_half_of_the_grid_loses_less_than_fewer_steps_where_all_is_known():
    rows = known_latents()
    assert {row["latents"] for row in rows} == set(GRIDS)
    for row in rows:
        assert row["cost_in_steps"] <= row["fewer_steps"]
        own, fewer = row["db_to_all_steps"], row["fewer_db_to_all_steps"]
        assert own is None or own > fewer + 20
