"""Every option is listed with what it means, so that none has to be looked up in the source."""

import argparse
import dataclasses
import json

import pytest

from lipass.cli import INTERRUPTED, NOTHING_MATCHED, OK, main, target
from lipass.cli import doctor as some_command
from lipass.cli.options import known_options
from lipass.config import SECTIONS, Config
from lipass.passes import PASSES


def test_every_option_of_a_config_is_listed_with_a_meaning():
    listed = {one["name"]: one for one in known_options()}
    for name in Config.resolve("all").to_options():
        assert name in listed or name in SECTIONS
    assert all(len(one["meaning"]) > 10 for one in listed.values())


@pytest.mark.parametrize("one", known_options(), ids=lambda one: one["name"])
def test_default_that_is_listed_is_that_of_preset_all(one):
    section = one["name"].partition(".")[0]
    if one["default"] is not None and section in PASSES:
        assert getattr(PASSES[section](), one["name"].partition(".")[2]) == one["default"]
    elif one["default"] is not None:
        on = {section: True} if section in SECTIONS else {}  # no preset merges by itself
        assert Config.resolve("all", on).to_options()[one["name"]] == one["default"]


def test_every_option_of_a_pass_is_listed():
    listed = {one["name"]: one for one in known_options()}
    assert listed["share-blocks.nodes_min"]["meaning"].startswith("Fewest nodes of a layer")
    assert listed["sparse-attention.tile"]["meaning"].startswith("what sparse.tile says")
    for name, load in PASSES.items():
        assert all(f"{name}.{field.name}" in listed for field in dataclasses.fields(load()))


def test_text_narrows_the_list(capsys):
    assert main(["options", "budget_self"]) == OK
    said = capsys.readouterr().out
    assert "sparse.budget_self  0.3; reference: 0.2" in said
    assert "context.mode" not in said


def test_json_is_one_document(capsys):
    assert main(["options", "--json"]) == OK
    assert {"name", "default", "meaning", "others"} == set(json.loads(capsys.readouterr().out)[0])


def test_nothing_of_that_name(capsys):
    assert main(["options", "nonsense"]) == NOTHING_MATCHED
    assert capsys.readouterr().out == "none has 'nonsense'\n"


def test_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(some_command, "run", interrupted)
    assert main(["doctor"]) == INTERRUPTED == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("strict=true", {"strict": True}),
        ("steps=off", {"steps": False}),
        ("verify=off", {"verify": "off"}),
        ("disable=share-blocks,hoist-rows", {"disable": ("share-blocks", "hoist-rows")}),
        ("sparse.tile=4x8x4", {"sparse.tile": (4, 8, 4)}),
        ("sparse.tile=4,8,4", {"sparse.tile": (4, 8, 4)}),
        ("sparse.query_tile=none", {"sparse.query_tile": None}),
        ("pipeline=canonicalize", {"pipeline": "canonicalize"}),
        ("share-blocks.nodes_min=4", {"share-blocks.nodes_min": 4}),
        ("prune-context.tile=4x4x4", {"prune-context.tile": "4x4x4"}),
    ],
)
def test_options_are_read_as_people_write_them(written, read):
    args = argparse.Namespace(preset="all", option=[written])
    options = target.options_of(args)
    assert options == {"preset": "all", **read}
    Config.resolve(None, options)


@pytest.mark.parametrize(
    ("option", "code", "words"),
    [
        ("share-blocks.nodes_min=2", 0, "share-blocks"),
        ("share-block.nodes_min=2", 2, "did you mean 'share-blocks.nodes_min'?"),
        ("share-blocks.node_min=2", 2, "did you mean 'nodes_min'?"),
        ("share-blocks.nodes_min=few", 2, "must be int, got 'few'"),
    ],
)
def test_option_of_a_pass_goes_to_the_pass(option, code, words, world, capsys):
    assert main(["inspect", world, "-o", option]) == code
    said = capsys.readouterr()
    assert words in (said.err if code else said.out)
