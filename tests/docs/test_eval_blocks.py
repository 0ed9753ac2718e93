"""The page of `lipass eval` runs, word for word, on pictures of noise."""

import torch
from page_blocks import block_of

from lipass.policy.trajectory import parse_trajectory
from lipass.quality.results import Results
from lipass.quality.run import evaluate

PAGE = "docs/eval.md"
W2C = parse_trajectory("left-7, right-8", step_deg=6.0)


def film(seed):
    return torch.rand(len(W2C), 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@block_of(PAGE, 0)
def test_figures_of_tensors_are_had_in_a_few_lines(code, capsys):
    names = {"w2c": W2C, "film": film(0), "dense_frames": film(1), "fast_frames": film(1)}
    exec(code, {**names, "dense_seconds": [2.0] * 3, "fast_seconds": [1.0] * 3})
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[0] == "100.0"
    assert said[0].split()[2] == "2.0"
    assert said[1] == "unchanged"


@block_of(PAGE, 1)
def test_a_world_of_ones_own_is_evaluated(code, tmp_path):
    names = {
        "cameras_of": lambda case: W2C,
        "generate": lambda method, w2c, seed: (film(seed), [0.1] * 3),
    }
    exec(code, names)
    world = names["MyWorld"]()
    results = Results(tmp_path / "eval.jsonl", world.settings)
    evaluate(world, results, lambda *_, **__: None)
    assert [entry.verdict for entry in results] == [None, "unchanged"] * 4
