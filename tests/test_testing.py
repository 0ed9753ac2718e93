"""`lipass.testing`: what a user's tests of passes and models stand on."""

import importlib
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

from lipass.passes.core import Numerics, Pass
from lipass.testing import assert_refuses, assert_rewrites, graph_diff, print_graph, trace
from lipass.testing.modules import forget_modules

FACTS = "canonicalize,find-attention"


@dataclass(frozen=True)
class _Doubling(Pass):
    """Claim to be exact and double every ReLU."""

    name: ClassVar[str] = "doubling"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    requires: ClassVar[tuple[str, ...]] = ("find-attention",)

    def run(self, graph, ctx):
        for node in graph.find_nodes(op="call_function", target=F.relu):
            node.target = _doubled_relu
        return True


def _doubled_relu(x, inplace=False):
    return 2 * F.relu(x)


def named(q, k, v):
    return F.scaled_dot_product_attention(query=q, key=k, value=v)


def positional(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@pytest.fixture
def qkv():
    return tuple(torch.randn(1, 2, 8, 4) for _ in range(3))


def test_rewrite_is_asserted_and_its_diff_returned(qkv):
    diff = assert_rewrites(named, qkv, "canonicalize", removes="query=$q", adds="($q, $k, $v)")
    assert diff == graph_diff(named, qkv, "canonicalize")


def test_rewrite_that_does_not_happen_shows_the_graph(qkv):
    with pytest.raises(AssertionError, match=r"must rewrite the graph(.|\n)*scaled_dot_product"):
        assert_rewrites(positional, qkv, "canonicalize")


def test_rewrite_of_something_else_shows_the_diff(qkv):
    with pytest.raises(AssertionError, match="must remove 'dropout'"):
        assert_rewrites(named, qkv, "canonicalize", removes="dropout")


def test_exact_pass_that_changes_values_is_caught():
    with pytest.raises(AssertionError, match="not equal"):
        assert_rewrites(lambda x: F.relu(x) + 1, (torch.ones(4),), _Doubling())


def test_required_passes_run_in_front_of_a_single_one():
    from lipass.testing.tracing import as_pipeline

    assert str(as_pipeline(_Doubling())) == "canonicalize,find-attention,doubling"


def test_refusal_is_asserted_with_its_reason(qkv):
    pipeline = f"{FACTS},sparse-attention"
    assert_refuses(positional, qkv, pipeline, "other: ")


def test_refusal_for_another_reason_shows_the_reasons(qkv):
    with pytest.raises(AssertionError, match=r"must say 'too late', got\n  other: "):
        assert_refuses(positional, qkv, f"{FACTS},sparse-attention", "too late")


def test_refusal_that_rewrites_shows_the_diff(qkv):
    with pytest.raises(AssertionError, match=r"must leave the graph as it is, got\n-%"):
        assert_refuses(named, qkv, "canonicalize")


def test_graph_of_a_model_is_printed(mini_world, mini_world_inputs):
    gm = trace(mini_world, mini_world_inputs(4), mini_world_inputs(8))
    assert "scaled_dot_product_attention" in print_graph(gm.graph)


def test_sparse_attention_rewrites_the_fixture(mini_world, mini_world_inputs):
    assert_rewrites(
        mini_world,
        mini_world_inputs(4),
        f"{FACTS},sparse-attention",
        removes="scaled_dot_product_attention",
        adds="lipass.sparse_attention",
        grown=mini_world_inputs(8),
    )


def test_function_without_a_graph_is_refused():
    with pytest.raises(ValueError, match="must make one graph, got 0"):
        trace(lambda: 1, ())


_ONE = "import math as kit"
_OTHER = """
from types import ModuleType

def floor(value, by=3):
    return by

kit = ModuleType("kit")
kit.floor = floor
"""


def test_a_module_of_the_same_name_is_another_one_once_it_is_forgotten(
    tmp_path, monkeypatch, fresh_dynamo
):
    """As two checkouts have them: what is a builtin in the one is a function in the other."""
    made = []
    for folder, head in (("one", _ONE), ("other", _OTHER)):
        package = tmp_path / folder / "of_two_checkouts"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "parts.py").write_text(
            f"{head}\n\n\ndef scaled(x):\n    return x * kit.floor(2.5)\n"
        )
        monkeypatch.syspath_prepend(package.parent)
        forget_modules({"of_two_checkouts"})
        importlib.invalidate_caches()
        scaled = importlib.import_module("of_two_checkouts.parts").scaled
        torch._dynamo.reset()
        fast = torch.compile(lambda x, scaled=scaled: scaled(x), backend="eager", fullgraph=True)
        made.append(float(fast(torch.ones(()))))
    forget_modules({"of_two_checkouts"})
    assert made == [2.0, 3.0]
