"""Tokens of models that nobody here wrote, in tile order from patches to patches."""

import pytest
import torch
from zoo import ZOO

from lipass.kernels import registry
from lipass.testing import run_passes

pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

PIPELINE = (
    "canonicalize{{verify=false}},find-attention{{verify=false}},find-poses,find-steps,"
    "sparse-attention{{tile={tile} budget_self={budget}}},tile-order{{grids={grids}}}"
)


def run(name, tile, grids, budget=0.3):
    """Run the passes on two layers of a model; return what the last said, and the output."""
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.eval().requires_grad_(False)
    if name == "sana-wm":
        model.blocks = model.blocks[:2]
    names = list(inputs)

    def call(*args):
        return model(**dict(zip(names, args, strict=True)), return_dict=False)[0]

    text = PIPELINE.format(tile=tile, grids=grids, budget=budget)
    with registry.force("sparse"):
        traced = run_passes(call, list(inputs.values()), text)
    return [(note.action, note.reason) for note in traced.notes], traced.outputs


def test_wan_is_the_same_in_tile_order():
    _, expected = run("wan", "1x2x2", "off")
    said, actual = run("wan", "1x2x2", "whole")
    assert said == [("rewritten", "in tile order for 2 calls: slots a useful pair 1.00 to 1.00")]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_wan_in_runs_wastes_no_slots_at_its_borders():
    """Its grid is 3 x 4 x 6; where every block is visited, it does not matter which holds what."""
    _, expected = run("wan", "2x2x4", "off", budget=0.9999)
    said, actual = run("wan", "2x2x4", "runs", budget=0.9999)
    assert said == [("rewritten", "in tile order for 2 calls: slots a useful pair 3.16 to 1.23")]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_sana_wm_mixes_its_tokens_in_each_layer():
    ((action, why),), _ = run("sana-wm", "1x2x2", "whole")
    assert action == "kept"
    assert "come back" in why
