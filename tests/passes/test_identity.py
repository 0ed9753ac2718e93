"""Uuids change with all that a compilation depends on, and with nothing else."""

import dataclasses
import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import ClassVar

import pytest

from lipass.kernels.source import source_hash
from lipass.passes import PASSES, PIPELINES, identity
from lipass.passes.core import Numerics, Pass, PassPipeline
from lipass.passes.identity import code_uuid

OWN = """
    from dataclasses import dataclass
    from typing import ClassVar

    from lipass.passes.core import Numerics, Pass

    @dataclass(frozen=True)
    class Own(Pass):
        name: ClassVar[str] = "own"
        numerics: ClassVar[Numerics] = Numerics.EXACT

        def run(self, graph, ctx):
            return False
"""


@pytest.fixture
def own(tmp_path):
    """Return a pass of another package from its source."""

    def load(text):
        path = tmp_path / "own_pass_module.py"
        path.write_text(textwrap.dedent(text))
        spec = importlib.util.spec_from_file_location("own_pass_module", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["own_pass_module"] = module
        spec.loader.exec_module(module)
        return module.Own()

    yield load
    sys.modules.pop("own_pass_module", None)


def other(value, hint):
    """Return another value of an option."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value, *value) or (1,)
    return (8, 8) if "int" in hint else ("text",)


OPTIONS = [
    pytest.param(name, field.name, id=f"{name}.{field.name}")
    for name, load in PASSES.items()
    for field in dataclasses.fields(load())
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_each_option_changes_the_uuid(name, option):
    one = PASSES[name]()()
    (hint,) = [str(f.type) for f in dataclasses.fields(one) if f.name == option]
    changed = dataclasses.replace(one)
    # past the checks of the pass: only the identity is of interest
    object.__setattr__(changed, option, other(getattr(one, option), hint))
    assert changed.uuid() != one.uuid()


@pytest.mark.parametrize("name", PASSES)
def test_equal_passes_have_one_uuid(name):
    kind = PASSES[name]()
    assert kind().uuid() == kind().uuid()


def test_different_passes_have_different_uuids():
    assert len({load()().uuid() for load in PASSES.values()}) == len(PASSES)


def test_values_of_different_kinds_are_different():
    kind = PASSES["share-blocks"]()
    assert kind(nodes_min=1).uuid() != kind(nodes_min=True).uuid()


def test_uuid_is_the_same_in_another_process():
    text = (
        "from lipass.passes.core import PassPipeline as P; print(P.parse('canonicalize').uuid())"
    )
    said = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == PassPipeline.parse("canonicalize").uuid()


def test_pipelines_of_different_presets_differ():
    texts = set(PIPELINES.values())
    assert len({PassPipeline.parse(text).uuid() for text in texts}) == len(texts)


def test_order_is_part_of_a_pipeline():
    texts = "canonicalize,find-attention,find-steps", "canonicalize,find-steps,find-attention"
    first, second = map(PassPipeline.parse, texts)
    assert first.uuid() != second.uuid()


@pytest.mark.parametrize("where", ["__version__", "version.git_version"])
def test_version_of_torch_changes_the_uuid(where, monkeypatch):
    one = PASSES["canonicalize"]()()
    before = one.uuid(), code_uuid(())
    monkeypatch.setattr(f"torch.{where}", "9.9.9")
    assert one.uuid() != before[0]
    assert code_uuid(()) != before[1]


@pytest.mark.parametrize("where", ["kernels_hash", "source_hash"])
def test_source_of_lipass_changes_the_uuid(where, monkeypatch):
    one = PASSES["canonicalize"]()()
    before = one.uuid(), code_uuid(())
    monkeypatch.setattr(identity, where, lambda *folder: "another")
    assert one.uuid() != before[0]
    assert code_uuid(()) != before[1]


def test_source_of_another_package_changes_the_uuid(own):
    first = own(OWN).uuid()
    assert own(OWN).uuid() == first
    assert own(OWN.replace("return False", "return bool(0)")).uuid() != first


def test_base_class_of_another_package_counts(own):
    base = own(OWN)

    @dataclasses.dataclass(frozen=True)
    class Derived(type(base)):
        pass

    first = Derived().uuid()
    Path(sys.modules["own_pass_module"].__file__).write_text("# changed\n")
    assert Derived().uuid() != first


def test_class_without_a_source_is_of_this_process_only(monkeypatch):
    space = {"__name__": "typed_in"}
    exec(textwrap.dedent(OWN), space)
    one = space["Own"]()
    first = one.uuid()
    assert one.uuid() == first
    monkeypatch.setattr(identity, "_of_this_process", lambda: "another")
    assert one.uuid() != first


def test_options_and_order_are_no_part_of_the_code():
    a, b = PASSES["hoist-rows"]()(), PASSES["share-blocks"]()(nodes_min=3)
    assert code_uuid((a, b)) == code_uuid((b,)) == code_uuid(())


def test_passes_of_other_packages_are_part_of_the_code():
    @dataclasses.dataclass(frozen=True)
    class Here(Pass):
        name: ClassVar[str] = "here"
        numerics: ClassVar[Numerics] = Numerics.EXACT

        def run(self, graph, ctx):
            return False

    assert code_uuid((Here(),)) != code_uuid(())


def test_hash_of_sources_sees_names_and_contents(tmp_path):
    def hashed(**files):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        source_hash.cache_clear()
        return source_hash(tmp_path)

    first = hashed(a="x = 1")
    assert hashed(a="x = 1") == first
    assert hashed(a="x = 2") != first
    assert hashed(b="x = 1") != first
    assert hashed(a="x = 1", b="") != first
    (tmp_path / "notes.txt").write_text("no source")
    source_hash.cache_clear()
    assert source_hash(tmp_path) == hashed(a="x = 1", b="")
    source_hash.cache_clear()
