"""`lipass inspect`: what it shows, and how it refuses."""

import json
import textwrap

import pytest
import torch

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

    class Broken(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + 1

    def broken():
        return Broken(), (torch.zeros(4),)

    def reads():
        scale = torch.rand(1).item()
        return nn.Linear(4, 4), (torch.ones(1, 4) * scale,)

    def huge():
        return nn.Linear(1_000_000, 1_000_000), (torch.zeros(1, 1_000_000),)

    class Failing(nn.Module):
        def forward(self, x):
            assert x.shape[0] == 5, "wants five"
            return x @ x

    def failing():
        return Failing(), (torch.zeros(4),)

    def only_model():
        return Attention()

    def of_methods():
        return torch.nn.Identity.__base__(), ()

    constant = 3

    print("hello from its file")
"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "user_model.py"
    path.write_text(textwrap.dedent(MODEL))
    return path


def document(capsys):
    return json.loads(capsys.readouterr().out)


def test_table_names_the_site_and_the_reason(model, capsys):
    assert main(["inspect", f"{model}:attention"]) == 0
    shown = capsys.readouterr().out
    assert "1 attention site, 0 rewritten" in shown
    assert "user_model.py:8" in shown
    assert "kept" in shown


def test_json_is_the_only_thing_on_stdout(model, capsys):
    assert main(["inspect", f"{model}:plain", "--json"]) == 0
    assert document(capsys)["schema_version"] == 2


def test_json_lists_passes_in_order_with_notes(model, capsys):
    main(["inspect", f"{model}:attention", "--preset", "sparse", "--json"])
    passes = document(capsys)["passes"]
    names = [one["name"] for one in passes]
    assert names[:2] == ["canonicalize", "find-attention"]
    assert names[-7:-4] == ["pool-history", "tile-order", "attend-pieces"]
    assert names[-4:] == ["carry-floats", "avoid-faults", "hoist-calls", "share-blocks"]
    assert all(note["reason"] for one in passes for note in one["notes"])


def test_preset_off_runs_no_pass(model, capsys):
    main(["inspect", f"{model}:attention", "--preset", "off", "--json"])
    shown = document(capsys)
    assert shown["passes"] == []
    assert [site["action"] for site in shown["sites"]] == ["kept"]


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
        ("of_methods", "got a Module, which has no forward; return the method that is called"),
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


def test_equal_notes_of_many_sites_are_one_line():
    from lipass.cli.inspect_table import _notes

    notes = [{"site": f"blocks.{i}", "action": "kept", "reason": "small"} for i in range(6)]
    assert list(_notes(notes)) == ["    kept      blocks.0-5 x6: small"]


SITE_FIELDS = [
    "name",
    "source",
    "role",
    "grid",
    "segments",
    "action",
    "reason",
    "provider",
    "density",
]


def test_each_site_has_the_documented_fields(model, capsys):
    main(["inspect", f"{model}:attention", "--json"])
    (site,) = document(capsys)["sites"]
    assert [key for key in SITE_FIELDS if key not in site] == []
    assert site["source"] == "user_model.py:8"
    assert site["provider"] is None


def test_graph_break_has_its_line_and_a_remedy(model, capsys):
    main(["inspect", f"{model}:broken", "--json"])
    (found,) = document(capsys)["graph_breaks"]
    assert found["source"] == "user_model.py:26"
    assert "graph_break" in found["reason"]
    assert found["remedy"].startswith("Remove")


def test_graph_breaks_are_in_the_table(model, capsys):
    main(["inspect", f"{model}:broken"])
    shown = capsys.readouterr().out
    assert "1 graph break\n" in shown
    assert "remedy: Remove" in shown


def test_pipeline_has_a_uuid(model, capsys):
    from lipass.passes.core import PassPipeline

    main(["inspect", f"{model}:plain", "--json"])
    shown = document(capsys)
    assert shown["pipeline_uuid"] == PassPipeline.parse(shown["pipeline"]).uuid()


def test_tensors_are_fake_unless_asked_for(model, capsys):
    main(["inspect", f"{model}:attention", "--json"])
    assert document(capsys)["fake"] is True
    main(["inspect", f"{model}:attention", "--json", "--real"])
    shown = document(capsys)
    assert (shown["fake"], shown["why_real"]) == (False, "asked for")


def test_a_callable_that_reads_values_gets_real_tensors(model, capsys):
    assert main(["inspect", f"{model}:reads", "--json"]) == 0
    said = capsys.readouterr()
    shown = json.loads(said.out)
    assert shown["fake"] is False
    assert "DataDependentOutputException at user_model.py" in shown["why_real"]
    assert "fake tensors do not do here" in said.err


def test_fake_is_kept_to_where_it_is_asked_for(model, capsys):
    assert main(["inspect", f"{model}:reads", "--fake"]) == 1
    assert "must return (model, inputs), and raised" in capsys.readouterr().err


def test_fake_and_real_exclude_each_other(model):
    assert main(["inspect", f"{model}:attention", "--fake", "--real"]) == 2


def test_a_model_that_fails_is_named_with_its_line(model, capsys):
    assert main(["inspect", f"{model}:failing"]) == 1
    assert "user_model.py:41" in capsys.readouterr().err


def test_no_line_is_longer_than_80_columns(model, capsys):
    main(["inspect", f"{model}:attention"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[1:])) <= 80


def test_piped_output_has_no_colour(model, capsys):
    main(["inspect", f"{model}:attention"])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(("variable", "coloured"), [(None, True), ("1", False)])
def test_colour_is_for_terminals_without_no_color(variable, coloured, monkeypatch):
    import sys

    from lipass.cli.terminal import paint

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable:
        monkeypatch.setenv("NO_COLOR", variable)
    assert paint("kept", "yellow").startswith("\x1b[") is coloured


def test_a_long_name_gives_way_at_its_front():
    from lipass.cli.terminal import columns

    rows = [("site", "reason"), ("a" * 90 + ".attn", "short")]
    shown = columns(rows)[1]
    assert len(shown) <= 80
    assert ".attn" in shown


def test_a_model_without_memory_is_inspected(model, capsys):
    """A layer of 4 TB: fake tensors have shapes and no storage."""
    assert main(["inspect", f"{model}:huge", "--fake", "--json"]) == 0
    assert document(capsys)["graphs"][0]["flops"] == 2 * 1_000_000 * 1_000_000


def test_unknown_preset_is_usage(model, capsys):
    assert main(["inspect", f"{model}:attention", "--preset", "fast"]) == 2
    assert "preset must be one of off, exact" in capsys.readouterr().err


def test_option_without_value_is_usage(model, capsys):
    assert main(["inspect", f"{model}:attention", "-o", "strict"]) == 2
    assert "must be KEY=VALUE, got 'strict'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "cast", ["to(torch.bfloat16)", "half()", "double()", "to('cpu', torch.half)"]
)
def test_builder_that_casts_its_model_keeps_fake_tensors(cast, tmp_path, capsys):
    file = tmp_path / "casting.py"
    file.write_text(
        "import torch\n"
        "def build():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))\n"
        f"    model = model.eval().{cast}\n"
        "    return model, (torch.randn(2, 8, dtype=model[0].weight.dtype),)\n"
    )
    before = torch.nn.Module._apply
    assert main(["inspect", f"{file}:build", "--json"]) == 0
    assert document(capsys)["fake"] is True
    assert torch.nn.Module._apply is before


SHARING = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x, k, v

    class World(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(4, 32), nn.Linear(32, 4)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, latents):
            b, c, t, y, x = latents.shape
            h, kept = self.embed(latents.flatten(2).transpose(1, 2)), []
            for block in self.blocks:
                h, *cache = block(h)
                kept.append(cache)
            return self.head(h).transpose(1, 2).reshape(b, c, t, y, x), kept

    def build():
        return World().eval(), (torch.zeros(1, 4, 4, 8, 8),)
"""


def test_pass_that_rewrites_no_attention_gives_no_reason_for_a_site(tmp_path, capsys):
    path = tmp_path / "sharing.py"
    path.write_text(textwrap.dedent(SHARING))
    assert main(["inspect", f"{path}:build", "--json", "--preset", "exact"]) == 0
    found = document(capsys)
    [shares] = [one for one in found["passes"] if one["name"] == "share-blocks"]
    assert any("not shared" in note["reason"] for note in shares["notes"])
    assert [site["reason"] for site in found["sites"]] == ["its keys are one piece"] * 2
