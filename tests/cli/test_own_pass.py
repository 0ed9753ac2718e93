"""A pass of another package: found by entry point, run where a pipeline names it."""

import importlib
import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lipass import passes
from lipass.cli import main
from lipass.testing import assert_refuses, assert_rewrites

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_pass"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that writes the metadata pip would, for one entry point."""

    def run(name, value):
        made = tmp_path / "installed" / "lipass_own_pass-0.1.dist-info"
        made.mkdir(parents=True)
        (made / "METADATA").write_text("Metadata-Version: 2.1\nName: own-pass\nVersion: 1\n")
        (made / "entry_points.txt").write_text(f"[{passes.GROUP}]\n{name} = {value}\n")
        monkeypatch.syspath_prepend(str(made.parent))
        monkeypatch.syspath_prepend(str(EXAMPLE))
        passes.registered.cache_clear()

    yield run
    monkeypatch.undo()
    passes.registered.cache_clear()
    sys.modules.pop("own_pass", None)


@pytest.fixture
def installed(install):
    text = (EXAMPLE / "pyproject.toml").read_text()
    ((name, value),) = tomllib.loads(text)["project"]["entry-points"][passes.GROUP].items()
    install(name, value)
    return name


@pytest.fixture
def own_pass(installed):
    return importlib.import_module("own_pass").DropDropout()


def test_it_appears_in_inspect(installed, world, capsys):
    assert main(["inspect", world, "--add", installed, "--json"]) == 0
    *_, own, last = json.loads(capsys.readouterr().out)["passes"]
    assert (own["name"], own["changed"]) == ("drop-dropout", True)
    assert last["name"] == "share-blocks"
    assert [note["reason"] for note in own["notes"]] == [
        "dropout of 0.1 outside of training is nothing"
    ] * 2


def test_it_runs_in_a_pipeline_of_the_backend(installed):
    def fn(x):
        return F.dropout(x, 0.1, False) + 1

    options = {"inner": "eager", "pipeline": "canonicalize,drop-dropout"}
    x = torch.ones(4)
    compiled = torch.compile(fn, backend="light_interaction", options=options)
    assert torch.equal(compiled(x), fn(x))


def test_it_rewrites_dropout_outside_of_training(own_pass):
    assert_rewrites(
        lambda x: F.dropout(x, 0.1, False) + 1, (torch.ones(4),), own_pass, removes="dropout"
    )


def test_it_refuses_dropout_in_training(own_pass):
    assert_refuses(
        lambda x: F.dropout(x, 0.1, True) + 1, (torch.ones(4),), own_pass, "it is for training"
    )


def test_a_pass_nobody_registers_is_usage(world, capsys):
    assert main(["inspect", world, "--add", "drop-dropouts"]) == 2
    assert "unknown pass 'drop-dropouts'" in capsys.readouterr().err


def test_a_name_of_this_project_is_refused(install):
    install("canonicalize", "own_pass:DropDropout")
    with pytest.raises(ValueError, match="a name of its own, got 'canonicalize'"):
        passes.registered()


def test_an_entry_point_with_another_name_is_refused(install):
    from lipass.passes.core import PassPipeline

    install("other-name", "own_pass:DropDropout")
    with pytest.raises(ValueError, match="with the same name, got"):
        PassPipeline.parse("other-name")
