"""What is suggested for a name that is none is what was meant, or nothing."""

import pytest

from lipass.config import Config
from lipass.passes.nearest import nearest


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("tile", "did you mean 'sparse.tile'?"),
        ("Tile", "did you mean 'sparse.tile'?"),
        ("hfov", "did you mean 'hfov_deg'?"),
        ("budget", "did you mean 'sparse.budget'?"),
        ("mode", "did you mean 'context.mode' or 'steps.mode'?"),
        ("context.window", "did you mean 'context.window_latents'?"),
        ("stepz.form", "did you mean 'steps.form'?"),
        ("sparse.budget_dcode", "did you mean 'sparse.budget_decode'?"),
        ("share-block.nodes_min", "did you mean 'share-blocks.nodes_min'?"),
        ("share_blocks.nodes_min", "did you mean 'share-blocks.nodes_min'?"),
        ("nodes_min", "did you mean 'share-blocks.nodes_min'?"),
        ("dtype", "see `lipass options`"),
        ("fullgraph", "see `lipass options`"),
        ("dynamic", "see `lipass options`"),
    ],
)
def test_option_that_is_none_is_told_what_was_meant(written, meant):
    with pytest.raises(ValueError, match="must name what can be told") as raised:
        Config.resolve("all", {written: 1})
    assert str(raised.value).endswith(meant)


@pytest.mark.parametrize(
    ("preset", "meant"),
    [
        ("Sparse", "did you mean 'sparse'?"),
        ("sparce", "did you mean 'sparse'?"),
        ("matrix-game", "did you mean 'reference-matrix-game'?"),
        ("max-autotune", "use 'all', or 'exact' where nothing may change"),
        ("fast", "use 'all', or 'exact' where nothing may change"),
    ],
)
def test_preset_that_is_none_is_not_told_to_switch_off(preset, meant):
    with pytest.raises(ValueError, match="preset must be one of") as raised:
        Config.resolve(preset)
    assert str(raised.value).endswith(meant)


def test_nothing_is_near_to_nothing():
    assert nearest("", ["a"]) == nearest("a", []) == nearest(1, ["preset"]) == []
