"""What base measures: all with and without sparse attention, on the grid of base."""

import torch

from benchmarks import base_world
from lipass import Config
from lipass.examples.tinyworld.codec import Codec
from lipass.examples.tinyworld.model import BASE, ModelConfig, TinyWorld
from lipass.examples.tinyworld.scenario import make_scenario

TINY = ModelConfig(rows=4, columns=4, width=48, heads=1, blocks=1, mlp_ratio=1, text_width=8)


def test_all_is_measured_with_and_without_sparse_attention():
    chosen = base_world.methods((0.3,), "eager")
    tiles = ["all, 1x8x8, 0.3", "all, 4x4x4, 0.3"]
    assert list(chosen) == ["off", "all, dense attention", "all", *tiles]
    configs = {name: Config.resolve(None, options) for name, (_, options) in chosen.items()}
    dense, sparse = configs["all, dense attention"], configs["all, 4x4x4, 0.3"]
    assert dense.sparse is None
    assert (dense.context, dense.steps) == (sparse.context, sparse.steps)
    assert sparse.sparse.budget_decode == 0.3
    assert sparse.sparse.dense_tokens == 0
    assert sparse.sparse.tile == (4, 4, 4)


def test_weights_of_small_stand_in_on_the_grid_of_base():
    name, model, _ = base_world.weights()
    assert name in ("small", "base")
    assert model.config == BASE
    assert model.rotary.cos.shape[0] == 256


def test_a_row_has_the_name_of_its_method():
    torch.manual_seed(0)
    model, codec = TinyWorld(TINY).eval().requires_grad_(False), Codec().requires_grad_(False)
    scene = make_scenario("forward/back", "explored", 9001, codec, pixels=32)
    chosen = {"off": base_world.methods((), "eager")["off"]}
    (row,) = base_world.rows(model, codec, [scene], chosen, "eager", 1)
    assert (row["method"], row["speedup_vs_off"]) == ("off", 1.0)
    assert "preset" not in row
