"""`lipass inspect`: what it shows, and how it refuses."""

import json
import textwrap

import pytest

from lipass.cli import main

MODEL = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Attention(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    class Plain(nn.Module):
        def forward(self, x):
            print("hello from the model")
            return x * 2

    def attention():
        return Attention(), tuple(torch.zeros(1, 2, 64, 16) for _ in range(3))

    def plain():
        return Plain(), {"x": torch.zeros(4)}

    def two_calls():
        return Attention(), [tuple(torch.zeros(1, 2, n, 16) for _ in range(3)) for n in (64, 65)]

    def only_model():
        return Attention()

    constant = 3
"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "user_model.py"
    path.write_text(textwrap.dedent(MODEL))
    return path


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    import torch

    torch._dynamo.reset()


def document(capsys):
    return json.loads(capsys.readouterr().out)


def test_table_names_the_site_and_the_reason(model, capsys):
    assert main(["inspect", f"{model}:attention"]) == 0
    shown = capsys.readouterr().out
    assert "1 attention sites" in shown
    assert "user_model.py:8" in shown
    assert "kept" in shown


def test_json_is_the_only_thing_on_stdout(model, capsys):
    assert main(["inspect", f"{model}:plain", "--json"]) == 0
    assert document(capsys)["schema_version"] == 1


def test_json_lists_passes_in_order_with_notes(model, capsys):
    main(["inspect", f"{model}:attention", "--preset", "sparse", "--json"])
    (graph,) = document(capsys)["graphs"]
    names = [one["name"] for one in graph["passes"]]
    assert names[:2] == ["canonicalize", "find-attention"]
    assert names[-1] == "sparse-attention"
    assert all(note["reason"] for one in graph["passes"] for note in one["notes"])


def test_preset_off_runs_no_pass(model, capsys):
    main(["inspect", f"{model}:attention", "--preset", "off", "--json"])
    assert document(capsys)["graphs"][0]["passes"] == []


def test_every_call_is_inspected(model, capsys):
    main(["inspect", f"{model}:two_calls", "--json"])
    assert len(document(capsys)["graphs"]) == 2


def test_strict_with_sites_is_ok(model):
    assert main(["inspect", f"{model}:attention", "--strict"]) == 0


def test_strict_without_sites_exits_with_3(model, capsys):
    assert main(["inspect", f"{model}:plain", "--strict"]) == 3
    assert "no attention site" in capsys.readouterr().err


def test_option_reaches_the_pass(model, capsys):
    target = f"{model}:attention"
    assert main(["inspect", target, "-o", "sparse.budget_decode=7"]) == 2
    assert "budget_decode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nothing", "must be module:callable or file.py:callable, got 'nothing'"),
        ("missing.py:build", "must exist, got 'missing.py'"),
        ("no_such_module_here:build", "No module named 'no_such_module_here'"),
    ],
)
def test_wrong_target_is_usage(target, said, capsys):
    assert main(["inspect", target]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("constant", "must define the callable 'constant'"),
        ("only_model", "must return (model, inputs), got Attention"),
    ],
)
def test_wrong_callable_is_usage(model, name, said, capsys):
    assert main(["inspect", f"{model}:{name}"]) == 2
    assert said in capsys.readouterr().err


def test_failing_pass_exits_with_1_and_names_itself(model, capsys, monkeypatch):
    from lipass.passes import runner
    from lipass.passes.core import PassError

    def fail(*args, **options):
        raise PassError("pass 'canonicalize' failed on %q")

    monkeypatch.setattr(runner, "run_pipeline", fail)
    assert main(["inspect", f"{model}:attention"]) == 1
    assert "pass 'canonicalize' failed on %q" in capsys.readouterr().err


def test_equal_notes_of_many_sites_are_one_line(capsys):
    from lipass.cli.inspect import _notes

    notes = [{"site": f"blocks.{i}", "action": "kept", "reason": "small"} for i in range(6)]
    assert list(_notes(notes)) == ["    kept      blocks.0 .. blocks.5 (6): small"]


def test_unknown_preset_is_usage(model, capsys):
    assert main(["inspect", f"{model}:attention", "--preset", "fast"]) == 2
    assert "preset must be one of off, exact" in capsys.readouterr().err


def test_option_without_value_is_usage(model, capsys):
    assert main(["inspect", f"{model}:attention", "-o", "strict"]) == 2
    assert "must be KEY=VALUE, got 'strict'" in capsys.readouterr().err
