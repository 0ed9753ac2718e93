"""What goes wrong around a command is told in one line, before the work where it can be known."""

import errno
import os
import signal
import textwrap

import pytest

from lipass.cli import doctor as some_command
from lipass.cli import main, toolchain
from lipass.cli.failures import raised

MODEL = """
    import os, signal, sys
    import torch
    from torch import nn

    def fine():
        return nn.Linear(4, 4), (torch.zeros(1, 4),)

    def interrupted():
        signal.raise_signal(signal.SIGINT)

    def exits():
        sys.exit("no licence")

    class Exits(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            raise SystemExit(3)

    def exits_in_forward():
        return Exits(), (torch.zeros(4),)

    def broken_weights():
        model = nn.Linear(4, 4)
        model.load_state_dict({"weigth": torch.zeros(4, 4)})
        return model, (torch.zeros(1, 4),)

    def weights_cut_short():
        with open("cut.pt", "wb") as file:
            file.write(b"PK no more of it")
        return nn.Linear(4, 4), (torch.load("cut.pt"),)

    def no_call():
        return nn.Linear(4, 4), []

    def tensors_in_a_list():
        return nn.Linear(4, 4), [torch.zeros(1, 4)]

    def uncallable():
        return {"weight": 1}, (torch.zeros(4),)
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing_model.py").write_text(textwrap.dedent(MODEL))
    return lambda name: f"{tmp_path / 'failing_model.py'}:{name}"


@pytest.fixture(autouse=True)
def _interrupts():
    """Take interrupts as a terminal's shell gives them: started behind `&` they are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def run(*argv, capsys):
    code = main(list(argv))
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, said.err.strip().splitlines()


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("interrupted", 130, ["interrupted"]),
        ("exits", 1, ["failing_model.py:13", "exit code 'no licence'"]),
        ("exits_in_forward", 1, ["must run", "exit code 3"]),
        ("broken_weights", 1, ["failing_model.py:25", "Missing key(s)", '"bias"', '"weigth"']),
        ("weights_cut_short", 1, ["failing_model.py:31", "must return (model, inputs)"]),
        ("no_call", 2, ["got an empty list", "a tuple of arguments"]),
        ("tensors_in_a_list", 2, ["got a list of Tensor", "a tuple of arguments"]),
        ("uncallable", 2, ["a model of kind dict", "return a module"]),
    ],
)
def test_target_that_fails_is_told_in_one_line(target, name, code, words, capsys):
    got, _, said = run("inspect", target(name), "--real", capsys=capsys)
    assert got == code
    assert said[-1].startswith("lipass inspect: ")
    assert [word for word in words if word not in said[-1]] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def build(:\n", ["raised SyntaxError at odd.py:1"]),
        ("import no_such_thing\n", ["raised ModuleNotFoundError at odd.py:1", "no_such_thing"]),
        ("raise SystemExit\n", ["left the process at odd.py:1"]),
        ("1 / 0\n", ["raised ZeroDivisionError at odd.py:1"]),
    ],
)
@pytest.mark.parametrize("form", ["file", "module"])
def test_file_that_cannot_be_imported(text, words, form, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(text)
    written = "odd.py:build" if form == "file" else "odd:build"
    code, _, said = run("inspect", written, capsys=capsys)
    assert code in (1, 2)
    if form == "file":
        assert [word for word in words if word not in said[-1]] == []


def test_target_finds_what_stands_beside_it(tmp_path, capsys):
    (tmp_path / "its_layers.py").write_text("from torch.nn import Linear\n")
    (tmp_path / "uses_layers.py").write_text(
        "import torch\nfrom its_layers import Linear\n"
        "def build():\n    return Linear(2, 2), (torch.zeros(1, 2),)\n"
    )
    code, out, _ = run("inspect", f"{tmp_path}/uses_layers.py:build", capsys=capsys)
    assert (code, "graph 0" in out) == (0, True)


def test_target_inside_of_a_package_imports_relatively(tmp_path, capsys):
    package = tmp_path / "its_package" / "models"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package.parent / "layers.py").write_text("from torch.nn import Linear\n")
    (package / "net.py").write_text(
        "import torch\nfrom ..layers import Linear\n"
        "def build():\n    return Linear(2, 2), (torch.zeros(1, 2),)\n"
    )
    assert run("inspect", f"{package}/net.py:build", capsys=capsys)[0] == 0


def test_target_called_like_a_module_in_use_leaves_that_alone(tmp_path, capsys):
    import random

    (tmp_path / "random.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(2, 2), (torch.zeros(1, 2),)\n"
    )
    assert run("inspect", f"{tmp_path}/random.py:build", capsys=capsys)[0] == 0
    import random as again

    assert again is random


def test_wrong_name_is_told_what_the_file_defines(target, capsys):
    code, _, said = run("inspect", target("build"), capsys=capsys)
    assert code == 2
    assert "it defines fine, interrupted" in said[-1]


@pytest.mark.parametrize("option", ["--html", "--svg"])
def test_folder_in_place_of_a_file_is_told_before_the_model_is_built(
    option, target, tmp_path, capsys
):
    code, _, said = run("inspect", target("exits"), option, str(tmp_path), capsys=capsys)
    assert code == 2
    assert f"{option} must name a file, got the folder" in said[-1]


@pytest.mark.parametrize(
    ("command", "option"),
    [("inspect", "--emit-repro"), ("explain", "--emit-repro"), ("demo", "--out")],
)
def test_file_in_place_of_a_folder_is_told_before_the_work(command, option, target, capsys):
    given = [] if command == "demo" else [target("exits")]
    in_the_way = target("").rstrip(":")
    for path in (in_the_way, f"{in_the_way}/below"):
        code, _, said = run(command, *given, option, path, capsys=capsys)
        assert code == 2
        assert f"{option} must name a folder" in said[-1]


def test_disk_that_is_full_before_the_work(target, monkeypatch, tmp_path, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, _, said = run("inspect", target("exits"), "--html", "new.html", capsys=capsys)
    assert code == 2
    assert "No space left on device" in said[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["failing_model.py"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disk_that_fills_up_loses_nothing_that_is_printed(target, tmp_path, capsys):
    files = ["--html", "/dev/full", "--svg", str(tmp_path / "picture.svg")]
    code, out, said = run("inspect", target("fine"), *files, capsys=capsys)
    assert code == 1
    assert "graph 0" in out
    assert (tmp_path / "picture.svg").stat().st_size > 0
    assert "/dev/full: No space left on device" in said[-1]


def test_stdout_that_takes_no_more_is_told(monkeypatch, capsys):
    def full(args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(some_command, "run", full)
    monkeypatch.setattr("lipass.cli._leave_stdout", lambda: None)
    code, _, said = run("doctor", capsys=capsys)
    assert (code, "No space left on device" in said[-1]) == (1, True)


def test_reader_that_has_gone_is_no_failure_to_tell(monkeypatch, capsys):
    def gone(args):
        raise BrokenPipeError

    monkeypatch.setattr(some_command, "run", gone)
    monkeypatch.setattr("lipass.cli._leave_stdout", lambda: None)
    assert run("doctor", capsys=capsys) == (141, "", [])


@pytest.mark.parametrize(
    "argv",
    [["demo"], ["warmup", "fine"], ["bisect", "fine", "--inner", "inductor"]],
    ids=lambda argv: argv[0],
)
def test_missing_compiler_is_told_before_anything_is_built(argv, target, monkeypatch, capsys):
    monkeypatch.setattr(toolchain, "compiler", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    argv = [target("exits") if one == "fine" else one for one in argv]
    code, _, said = run(*argv, capsys=capsys)
    assert code == 1
    assert "Inductor needs a C++ compiler on a CPU" in said[-1]


def test_what_nobody_has_foreseen_is_one_line_and_a_traceback_under_debug(monkeypatch, capsys):
    def broken(args):
        raise RuntimeError("first line\n  second line")

    monkeypatch.setattr(some_command, "run", broken)
    code, _, said = run("doctor", capsys=capsys)
    assert code == 1
    assert len(said) == 1
    assert "raised RuntimeError at test_failures.py" in said[0]
    assert "first line second line; --debug shows the traceback" in said[0]
    assert main(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_message_of_many_lines_is_joined_and_dynamos_listing_left_out():
    text = "cannot do this\n  Explanation: because\n\n  Developer debug context: x\n"
    assert raised(ValueError(text)) == "raised ValueError: cannot do this Explanation: because"
