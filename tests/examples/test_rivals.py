"""The loops that presets are held against."""

import pytest
import torch

from lipass.examples.tinyworld.codec import Codec
from lipass.examples.tinyworld.compare import Contender, compare
from lipass.examples.tinyworld.model import ModelConfig, TinyWorld, tokenize
from lipass.examples.tinyworld.rivals import ONE_SIGMA, RIVALS, TWO_SIGMAS, retrieve_random, rivals
from lipass.examples.tinyworld.rollout import SIGMAS
from lipass.examples.tinyworld.scenario import make_scenario
from lipass.policy.trajectory import parse_trajectory


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(0)
    model = TinyWorld(ModelConfig(width=48, heads=1, blocks=1)).eval().requires_grad_(False)
    codec = Codec().eval().requires_grad_(False)
    scene = make_scenario("left/right", "explored", 9001, codec)
    with torch.no_grad():
        text = model.text(tokenize("room")[None])
        dense = Contender("off", model, "eager")
        found, _ = compare([dense, *rivals(dense)], scene, text, codec, 1, lambda told: None)
    return {row["preset"]: row for row in found}


def test_rivals_take_part_like_presets(rows):
    assert list(rows) == ["off", *RIVALS]


def test_rivals_take_fewer_steps_of_the_same_path():
    for sigmas in (ONE_SIGMA, TWO_SIGMAS):
        assert set(sigmas) < set(SIGMAS)
        assert (sigmas[0], sigmas[-1]) == (SIGMAS[0], SIGMAS[-1])


def test_what_they_cost_is_counted(rows):
    chunks = 8
    assert {name: row["steps_computed"] for name, row in rows.items()} == {
        "off": 4 * chunks,
        **{name: int(name[0]) * chunks for name in RIVALS},
    }
    read = {name: row["context_latents_mean"] for name, row in rows.items()}
    assert read == {
        "off": 20, "1 step": 20, "1 step, 12 latents": 12, "2 steps": 20,
        "2 steps, 12 latents": 12, "2 steps, 8 latents": 8, "2 steps, 8 random": 8,
    }  # fmt: skip


def test_random_latents_are_the_same_for_everybody():
    w2c = parse_trajectory("left-39")
    drawn = retrieve_random(w2c, w2c[:4], 8)
    assert drawn == retrieve_random(w2c, w2c[:4], 8) == sorted(set(drawn))
    assert drawn[-4:] == [36, 37, 38, 39]
    assert retrieve_random(w2c[:8], w2c[:4], 8) == [*range(8)]
