import dataclasses
from typing import ClassVar

import pytest

from lipass.passes import PASSES, PIPELINES
from lipass.passes.approx.sparse_attention import SparseAttention
from lipass.passes.core import Numerics, Pass, PassPipeline

ALL = PIPELINES["all"]


def test_pipeline_text_parses_back():
    text = (
        "canonicalize,find-attention{token_grid=8x8 segments=text+history+current},"
        "sparse-attention{tile=2x4x4 budget_decode=0.25 dense_layers=0x3}"
    )
    assert str(PassPipeline.parse(text)) == text


def test_defaults_are_not_printed():
    assert str(SparseAttention(tile=(4, 4, 4))) == "sparse-attention"


def test_empty_pipeline():
    assert str(PassPipeline.parse("")) == ""


@pytest.mark.parametrize("preset", PIPELINES)
def test_presets_parse(preset):
    assert str(PassPipeline.parse(PIPELINES[preset])) == PIPELINES[preset]


def test_text_overrides_defaults():
    pipeline = PassPipeline.parse(
        "canonicalize,find-attention,sparse-attention{budget_decode=0.5}",
        {"sparse-attention.budget_decode": 0.1, "sparse-attention.budget_prefill": 0.2},
    )
    assert str(pipeline).endswith("sparse-attention{budget_prefill=0.2 budget_decode=0.5}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canonicalise", "unknown pass 'canonicalise'; did you mean 'canonicalize'?"),
        ("canonicalize{x=1}", "canonicalize has no option 'x'"),
        (f"{ALL}{{budget=0.1}}", "share-blocks has no option 'budget'"),
        ("canonicalize,find-attention{token_grid}", "is written key=value, got 'token_grid'"),
        ("canonicalize,find-attention{token_grid=axb}", "find-attention.token_grid must be"),
        ("canonicalize,find-attention{token_grid=8}", r"must be \(Y, X\) or \(T, Y, X\), got"),
        (
            "canonicalize,find-attention{segments=txt}",
            "segments must be of text, history, current",
        ),
        ("canonicalize{", "is written name{option=value ...}, got 'canonicalize{'"),
        ("find-attention", "find-attention needs canonicalize in front of it"),
        (
            "canonicalize,find-attention,find-poses,sparse-attention,prune-context",
            "prune-context must come before sparse-attention",
        ),
        (
            "canonicalize,find-attention,find-steps,guard-steps,sparse-attention",
            "sparse-attention must come before guard-steps",
        ),
    ],
)
def test_bad_pipelines_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        PassPipeline.parse(text)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_a_frozen_value_whose_options_have_defaults(name):
    cls = PASSES[name]()
    assert issubclass(cls, Pass)
    assert cls.name == name
    assert isinstance(cls.numerics, Numerics)
    assert cls() == cls()
    assert hash(cls()) == hash(cls())
    assert str(cls()) == name
    assert dataclasses.is_dataclass(cls)


def test_approximate_passes_say_so():
    approx = {name for name in PASSES if PASSES[name]().numerics is Numerics.APPROX}
    leaving_out = {"merge-history", "prune-context", "sparse-attention", "nearest-blocks"}
    assert approx == {*leaving_out, "guard-steps"}


def test_bool_option_parses_back():
    @dataclasses.dataclass(frozen=True)
    class Toy(Pass):
        name: ClassVar[str] = "toy"
        numerics: ClassVar[Numerics] = Numerics.EXACT
        flag: bool = False

        def run(self, graph, ctx):
            return False

    PASSES["toy"] = lambda: Toy
    try:
        assert PassPipeline.parse("toy{flag=true}").passes == (Toy(flag=True),)
        assert str(Toy(flag=True)) == "toy{flag=true}"
    finally:
        del PASSES["toy"]
