"""`--emit-repro`: the scripts run outside of the repository and say whether the graphs agree."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from lipass.cli import main
from lipass.cli.repro_harness import cameras, compare, random

LOOP = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x, level):
            return torch.tanh(self.lin(x)) * level

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, sigmas):
            for i in range(3):
                x = x + (sigmas[i + 1] - sigmas[i]) * self.net(x, sigmas[i])
            return x

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(2, 8)

        def forward(self, tokens, shown, times):
            rows = self.embed(tokens).masked_fill(~shown[..., None], 0.0)
            rows[:, 0] = 0.0
            times.add_(1)
            return rows * times.to(rows.dtype), tokens.shape[1]

    class Sized(nn.Module):
        def forward(self, x):
            return x.transpose(0, 1).reshape(-1, x.shape[0] * 2)

    def loop():
        return Loop(), (torch.randn(2, 4), torch.rand(4))

    def words():
        tokens = torch.zeros(2, 3, dtype=torch.long)
        return Words(), (tokens, tokens == 0, torch.ones(3, 2, dtype=torch.int32).t()[..., None])

    def sized():
        return Sized(), (torch.randn(3, 8)[:, ::2],)

    @torch._dynamo.allow_in_graph
    def nameless(x):
        return x + 1

    nameless.__qualname__ = "make.<locals>.nameless"

    class Local(nn.Module):
        def forward(self, x):
            return nameless(x)

    def local():
        return Local(), (torch.ones(2),)
"""


@pytest.fixture
def models(tmp_path):
    path = tmp_path / "own_models.py"
    path.write_text(textwrap.dedent(LOOP))
    return path


@pytest.fixture
def run(tmp_path):
    """Run a script in a folder that has nothing else, with the installed packages only."""

    def call(text):
        folder = tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        script = folder / "repro.py"
        script.write_text(text)
        outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [sys.executable, script.name], cwd=folder, env=outside, capture_output=True, text=True
        )

    return call


@pytest.fixture
def emitted(tmp_path, capsys):
    """Return the text of the only script of a target."""

    def call(target, *options, command="inspect"):
        folder = tmp_path / "repro"
        code = main([command, target, *options, "--emit-repro", str(folder)])
        assert code == 0, capsys.readouterr().err
        (script,) = folder.iterdir()
        assert script.name == "graph_0.py"
        assert f"wrote {script}" in capsys.readouterr().err
        return script.read_text()

    return call


def test_script_of_a_decode_call_agrees(world, emitted, run):
    text = emitted(world)
    assert "BUDGET_0_3 = 1.0  # 0.3 in the compiled graph" in text
    assert "torch.ops.lipass.sparse_attention.default(" in text
    assert "self.blocks = AfterBlocks()" in text
    done = run(text)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "they agree" in done.stdout
    assert "before " in done.stdout


def test_script_of_explain_is_the_same(world, emitted):
    assert "class Before(torch.nn.Module):" in emitted(world, command="explain")


def test_script_of_a_graph_that_is_wrong_fails(world, emitted, run):
    head, after, body = emitted(world).partition("class After(")
    wrong = body.replace("permute(0, 2, 3, 4, 1)", "permute(0, 2, 4, 3, 1)")
    assert wrong != body
    done = run(head + after + wrong)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "they differ: the largest error is over" in done.stdout


def test_script_of_steps_needs_no_lipass(models, emitted, run):
    text = emitted(f"{models}:loop", "--preset", "cache")
    assert "self.denoise_step = AfterDenoiseStep()" in text
    assert "import lipass" not in text
    done = run(text)
    assert done.returncode == 0, done.stdout + done.stderr


def test_passes_that_are_exact_must_agree_bit_by_bit(models, emitted, run):
    text = emitted(f"{models}:loop", "-o", "pipeline=canonicalize,find-steps,hoist-steps")
    assert "tolerance=0.0" in text
    assert "largest error 0 of" in run(text).stdout


def test_indices_masks_strides_and_writes(models, emitted, run):
    text = emitted(f"{models}:words")
    assert '"l_times_": random((2, 3, 1), (1, 2, 1), torch.int32)' in text
    done = run(text)
    assert done.returncode == 0, done.stdout + done.stderr


def test_symbolic_sizes_have_the_values_of_the_trace(models, emitted, run):
    text = emitted(f"{models}:sized", "--dynamic")
    assert "random((3, 4), (8, 2), torch.float32)" in text
    done = run(text)
    assert done.returncode == 0, done.stdout + done.stderr


def test_graph_without_passes_is_written_too(models, emitted, run):
    assert run(emitted(f"{models}:sized", "--preset", "off")).returncode == 0


def test_function_that_cannot_be_imported_is_refused(models, tmp_path, capsys):
    assert main(["inspect", f"{models}:local", "--emit-repro", str(tmp_path / "repro")]) == 1
    assert "calls must be importable, got <function" in capsys.readouterr().err


def test_file_in_place_of_the_folder_is_usage(models, capsys):
    assert main(["inspect", f"{models}:sized", "--emit-repro", str(models)]) == 2
    assert "--emit-repro must name a folder" in capsys.readouterr().err


def test_without_the_option_nothing_is_written(models, tmp_path, capsys):
    before = set(tmp_path.iterdir())
    assert main(["inspect", f"{models}:sized"]) == 0
    assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"__pycache__"}


X = {"x": torch.linspace(-1, 1, 12).view(3, 4)}


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (lambda x: x.float() * (1 + 1e-3), "the largest error is over 0.0001"),
        (lambda x: x / 0, "the largest error is over"),
        (lambda x: x.double(), "value 0 is torch.float32[3, 4] before, torch.float64[3, 4]"),
        (lambda x: x[:2], "value 0 is torch.float32[3, 4] before, torch.float32[2, 4]"),
        (lambda x: (x, x), "2 outputs before, 3 after"),
        (lambda x: 3, "value 0 is tensor"),
    ],
    ids=["value", "nan", "dtype", "shape", "count", "kind"],
)
def test_differences_are_named(after, said, capsys):
    assert compare(lambda x: x + 0, after, X, 1e-4) == 1
    assert said in capsys.readouterr().out


def test_write_into_an_input_is_a_difference(capsys):
    assert compare(lambda x: x + 1, lambda x: x.add_(1) + 0, X, 1e-4) == 1
    assert compare(lambda x: x.add_(1) + 0, lambda x: x.add_(1) + 0, X, 1e-4) == 0


def test_random_numbers_are_drawn_alike():
    def noisy(x):
        return x + torch.randn_like(x)

    assert compare(noisy, noisy, X, 0.0) == 0


def test_tensors_have_the_strides_asked_for():
    made = random((3, 4), (1, 5), torch.bfloat16)
    assert (made.stride(), made.dtype) == ((1, 5), torch.bfloat16)
    assert random((0, 4), (4, 1), torch.float32).shape == (0, 4)
    assert random((), (), torch.bool).dtype is torch.bool


def test_cameras_are_matrices_of_cameras():
    made = cameras((1, 3, 4, 4), (48, 16, 4, 1), torch.float32)
    assert torch.equal(made[0, 1, :3, :3], torch.eye(3))
    assert not torch.equal(made[0, 1, :3, 3], made[0, 2, :3, 3])


def test_expanded_inputs_stay_expanded():
    given = {
        "x": random((2, 3), (0, 1), torch.float32),
        "w2c": cameras((2, 1, 4, 4), (0, 16, 4, 1), torch.float32),
    }
    assert (
        compare(
            lambda x, w2c: x.stride() + w2c.stride(), lambda **_: (0, 1, 0, 16, 4, 1), given, 0
        )
        == 0
    )
