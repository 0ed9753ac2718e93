"""`lipass bisect`: names the pass that is wrong, and no other."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from lipass import passes
from lipass.cli import main
from lipass.passes.core import Numerics, Pass


@dataclass(frozen=True)
class _Wrong(Pass):
    """Scale the queries of every attention call: valid metadata, wrong values."""

    name: ClassVar[str] = "wrong-on-purpose"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph, ctx):
        call = torch.nn.functional.scaled_dot_product_attention
        for node in graph.find_nodes(op="call_function", target=call):
            node.kwargs = {**node.kwargs, "scale": 2.0}
        return True


@dataclass(frozen=True)
class _Crashing(Pass):
    name: ClassVar[str] = "crashing-on-purpose"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph, ctx):
        raise RuntimeError("out of luck")


FACTS = "canonicalize,find-attention"


@pytest.fixture(autouse=True)
def _with_wrong_passes(monkeypatch):
    for cls in (_Wrong, _Crashing):
        monkeypatch.setitem(passes.PASSES, cls.name, lambda cls=cls: cls)


def bisect(world, capsys, pipeline, *more):
    code = main(["bisect", world, "-o", f"pipeline={pipeline}", "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def test_right_passes_agree(world, capsys):
    code, said = bisect(world, capsys, FACTS)
    assert (code, said["guilty"]) == (0, [])
    assert said["agrees"] == FACTS


@pytest.mark.parametrize(
    "pipeline",
    [
        f"wrong-on-purpose,{FACTS}",
        "canonicalize,wrong-on-purpose,find-attention",
        f"{FACTS},wrong-on-purpose",
    ],
)
def test_wrong_pass_is_named_wherever_it_stands(world, capsys, pipeline):
    code, said = bisect(world, capsys, pipeline)
    assert code == 1
    assert [one["name"] for one in said["guilty"]] == ["wrong-on-purpose"]
    assert said["guilty"][0]["error"] > 1e-4
    assert "wrong-on-purpose" not in said["agrees"]


def test_two_guilty_passes_are_both_named(world, capsys):
    code, said = bisect(world, capsys, f"wrong-on-purpose,{FACTS},crashing-on-purpose")
    assert code == 1
    guilty = {one["name"]: one for one in said["guilty"]}
    assert sorted(guilty) == ["crashing-on-purpose", "wrong-on-purpose"]
    assert "out of luck" in guilty["crashing-on-purpose"]["failure"]
    assert said["agrees"] == FACTS


def test_passes_that_need_the_guilty_one_go_with_it():
    from lipass.cli.bisect import _without
    from lipass.passes.core import PassPipeline

    pipeline = PassPipeline.parse("canonicalize,find-attention,find-poses,find-steps")
    left = _without(pipeline.passes, pipeline.passes[1])
    assert [one.name for one in left] == ["canonicalize", "find-steps"]


def test_terminal_names_the_guilty_pass(world, capsys):
    assert main(["bisect", world, "-o", f"pipeline=wrong-on-purpose,{FACTS}"]) == 1
    shown = capsys.readouterr().out
    assert "guilty: wrong-on-purpose (exact) differs by" in shown
    assert "what is left agrees with eager within 0.0001" in " ".join(shown.split())


def test_negative_tolerance_is_usage(world):
    assert main(["bisect", world, "--tolerance", "-1"]) == 2


def test_approximation_that_differs_as_it_may_is_no_fault(world, capsys):
    # 64 keys are too few for the cost gate to let them be sparse
    from lipass.kernels import registry

    with registry.force("sparse"):
        given = ["bisect", world, "--preset", "sparse", "-o", "sparse.tile=1x4x4"]
        assert main([*given, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["guilty"] == []
        [one] = found["approximate"]
        assert (one["name"], one["may_differ"]) == ("sparse-attention", True)
        assert one["error"] > 1e-4
        assert main(given) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "may differ: sparse-attention (approx) differs by" in shown
    assert "verdict: sound, only what is left out makes a difference" in shown


@dataclass(frozen=True)
class _Approximate(_Wrong):
    name: ClassVar[str] = "wrong-approximation"
    numerics: ClassVar[Numerics] = Numerics.APPROX


def test_approximation_that_differs_with_nothing_left_out_is_guilty(world, capsys, monkeypatch):
    monkeypatch.setitem(passes.PASSES, _Approximate.name, lambda: _Approximate)
    code, said = bisect(world, capsys, f"{FACTS},wrong-approximation")
    assert code == 1
    assert [one["name"] for one in said["guilty"]] == ["wrong-approximation"]
    assert said["approximate"] == []


def test_inner_compiler_may_be_an_option(world, capsys, monkeypatch):
    used = []
    monkeypatch.setattr(
        "lipass.backend.inner_compile",
        lambda gm, given, *, inner: used.append(inner) or gm.forward,
    )
    bisect(world, capsys, FACTS, "-o", "inner=aot_eager")
    assert {*used} == {"aot_eager"}
    used.clear()
    bisect(world, capsys, FACTS)
    assert {*used} == {"eager"}


def test_function_that_writes_to_what_no_trial_copies_is_refused(tmp_path, capsys):
    path = tmp_path / "counting.py"
    path.write_text(
        "import torch\n"
        "def build():\n"
        "    count = torch.zeros(1)\n"
        "    def call(x):\n"
        "        count.add_(1)\n"
        "        return x * count\n"
        "    return call, (torch.ones(1),)\n"
    )
    assert main(["bisect", f"{path}:build"]) == 1
    said = capsys.readouterr().err
    assert "must give the same twice" in said
    assert "return the module or its method" in said
