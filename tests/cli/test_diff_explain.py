"""`lipass diff` and `lipass explain`: what changed, and why."""

import pytest

from lipass.cli import main


def test_diff_of_one_pass_shows_both_graphs(world, capsys):
    assert main(["diff", world, "--pass", "sparse-attention", "--preset", "sparse"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "graph 0, sparse-attention"
    assert lines[1].startswith("@@")
    gone = [line for line in lines if line.startswith("-")]
    new = [line for line in lines if line.startswith("+")]
    assert any("scaled_dot_product_attention" in line for line in gone)
    assert any("lipass.sparse_attention" in line for line in new)


def test_diff_of_a_pass_that_changes_nothing_says_so(world, capsys):
    assert main(["diff", world, "--pass", "find-steps"]) == 0
    assert capsys.readouterr().out == "graph 0, find-steps: no change\n"


def test_strict_diff_without_a_change_exits_with_3(world):
    assert main(["diff", world, "--pass", "find-steps", "--strict"]) == 3


def test_diff_of_an_unknown_pass_is_usage(world, capsys):
    assert main(["diff", world, "--pass", "fuse-all"]) == 2
    assert "--pass must be one of canonicalize" in capsys.readouterr().err


def test_diff_without_passes_is_usage(world, capsys):
    assert main(["diff", world, "--preset", "off"]) == 2
    assert "must run a pass" in capsys.readouterr().err


def test_explain_tells_role_keys_and_passes(world, capsys):
    assert main(["explain", world, "blocks.0:decode"]) == 0
    shown = capsys.readouterr().out
    assert "blocks.0:decode  world_model.py:" in shown
    for line in (
        "  rewritten: decode, budget 0.3",
        "  role decode: it has history keys",
        "  queries 4x4x4",
        "  keys text 1x1x6: no whole number of latents of 16",
        "  keys history 4x4x4: l_w2c_ has a camera for each of its latents",
        "    sparse-attention: rewritten, decode, budget 0.3",
    ):
        assert line in shown


def test_explain_groups_equal_layers(world, capsys):
    main(["explain", world])
    assert capsys.readouterr().out.startswith("blocks.0-1:decode (2 sites)")


def test_explain_takes_a_pattern(world, capsys):
    main(["explain", world, "blocks.*"])
    shown = capsys.readouterr().out
    assert "blocks.0:decode" in shown
    assert "blocks.1:decode" in shown


def test_explain_of_an_unknown_site_names_a_close_one(world, capsys):
    assert main(["explain", world, "block.1:decode"]) == 2
    assert "did you mean 'blocks.1:decode'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["diff", "explain", "bisect"])
def test_unknown_preset_is_usage(command, world, capsys):
    assert main([command, world, "--preset", "fast"]) == 2
    assert "preset must be one of" in capsys.readouterr().err
