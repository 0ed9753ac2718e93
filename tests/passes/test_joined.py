"""A pass of another package in a preset, with options, and beside the dense twin."""

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

import lipass.passes
import lipass.passes.core
import lipass.passes.joined
from lipass.backend import pipeline_of
from lipass.compile.dense_twin import pipeline_of_twin
from lipass.config import Config
from lipass.passes.core import Numerics, Pass


@dataclass(frozen=True)
class MergeKeys(Pass):
    """Stand for a pass behind sparse-attention."""

    name: ClassVar[str] = "merge-keys"
    numerics: ClassVar[Numerics] = Numerics.APPROX
    requires: ClassVar[tuple[str, ...]] = ("sparse-attention",)
    section: ClassVar[str | None] = "sparse"
    presets: ClassVar[tuple[str, ...]] = ("sparse", "all")

    ratio: float = 0.5
    tile: tuple[int, ...] = (1, 2)

    def run(self, graph, ctx):
        return False


@dataclass(frozen=True)
class AfterMerge(MergeKeys):
    name: ClassVar[str] = "after-merge"
    requires: ClassVar[tuple[str, ...]] = ("merge-keys",)


@pytest.fixture
def register(monkeypatch):
    def run(*kinds):
        def found():
            return {kind.name: (lambda kind=kind: kind) for kind in kinds}

        for module in (lipass.passes, lipass.passes.core, lipass.passes.joined):
            monkeypatch.setattr(module, "registered", found)

    return run


def names(preset, **options):
    return [one.name for one in pipeline_of(Config.resolve(preset, options))]


def test_pass_that_declares_a_preset_joins_it_behind_what_it_requires(register):
    register(AfterMerge, MergeKeys)
    found = names("all")
    start = found.index("sparse-attention")
    assert found[start : start + 3] == ["sparse-attention", "merge-keys", "after-merge"]
    assert "merge-keys" not in names("context")


def test_section_that_is_off_takes_the_joined_pass_with_it(register):
    register(MergeKeys)
    assert "merge-keys" not in names("all", sparse=False)


def test_pass_that_declares_no_preset_runs_only_where_it_is_named(register, monkeypatch):
    monkeypatch.setattr(MergeKeys, "presets", ())
    register(MergeKeys)
    assert "merge-keys" not in names("all")


def test_joined_pass_without_what_it_requires_is_refused(register):
    register(AfterMerge)
    with pytest.raises(ValueError, match="'after-merge', which requires merge-keys, in preset"):
        names("all")


def test_options_of_a_pass_reach_it(register):
    register(MergeKeys)
    options = {"merge-keys.ratio": 0.25, "merge-keys.tile": [2, 4]}
    config = Config.resolve("all", options)
    (mine,) = [one for one in pipeline_of(config) if one.name == "merge-keys"]
    assert (mine.ratio, mine.tile) == (0.25, (2, 4))
    assert Config.resolve(None, config.to_options()) == config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"merge-keys.rate": 0.5}, "merge-keys has no option 'rate'; did you mean 'ratio'"),
        ({"merge-keys.ratio": "much"}, "merge-keys.ratio must be float, got 'much'"),
        (
            {"merge-key.ratio": 0.5},
            "got 'merge-key.ratio'; did you mean 'merge-keys.ratio'",
        ),
    ],
)
def test_wrong_options_of_a_pass_are_refused(register, options, words):
    register(MergeKeys)
    with pytest.raises(ValueError, match=words):
        pipeline_of(Config.resolve("all", options))


def test_twin_leaves_out_whoever_requires_what_is_left_out(register):
    register(MergeKeys, AfterMerge)
    twin = pipeline_of_twin(pipeline_of(Config.resolve("all")))
    left = {one.name for one in twin}
    assert not left & {"sparse-attention", "prune-context", "merge-keys", "after-merge"}
    assert "guard-steps" in left


def test_pass_of_another_package_may_leave_keys_out_too(register, monkeypatch):
    monkeypatch.setattr(MergeKeys, "requires", ("find-attention",))
    monkeypatch.setattr(MergeKeys, "leaves_out", True)
    register(MergeKeys)
    text = "canonicalize,find-attention,merge-keys"
    twin = pipeline_of_twin(pipeline_of(Config.resolve("sparse", {"pipeline": text})))
    assert str(twin) == "canonicalize,find-attention"


def test_importing_the_table_imports_no_pass():
    code = (
        "import sys, lipass.passes, lipass.config; lipass.config.Config.resolve('all');"
        "print([m for m in sys.modules if m.startswith('lipass.passes.') or m == 'torch'])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
