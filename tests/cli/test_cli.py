"""The command line: exit codes, what goes to stdout, progress on stderr."""

import json
import subprocess
import sys

import pytest

from lipass.cli import main
from lipass.cli.doctor import _next
from lipass.cli.progress import progress


def test_no_command_is_usage():
    assert main([]) == 2


def test_unknown_command_is_usage():
    assert main(["dance"]) == 2


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_are_ok(option):
    assert main([option]) == 0


def test_command_runs_as_a_module_too(tmp_path):
    asked = [sys.executable, "-m", "lipass", "--version"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "lipass")


@pytest.mark.parametrize("threads", ["0", "-2", "many"])
def test_wrong_threads_are_usage(threads, capsys):
    assert main(["demo", "--threads", threads]) == 2
    assert "--threads" in capsys.readouterr().err


def test_full_and_quick_exclude_each_other():
    assert main(["demo", "--full", "--quick"]) == 2


def test_doctor_prints_one_document(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]
    operations = {line["operation"] for line in found["providers"]}
    assert operations == {"pool", "select", "block_sparse"}


def test_doctor_finds_the_reference_everywhere(capsys):
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("reference   cpu     yes" in line for line in lines) == 3


def test_doctor_names_caches_and_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of_kernels"))
    main(["doctor"])
    shown = capsys.readouterr().out
    assert f"cache      kernels: {tmp_path}/of_kernels/lipass" in shown
    assert "cache      inductor: /" in shown
    ending = shown.partition("what to do next\n")[2]
    assert "lipass inspect FILE:CALLABLE" in ending


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"backend_registered": False}, "register the backend"),
        ({"compiler": None}, "install a C++ compiler"),
        ({"caches": {"kernels": "/proc/nowhere"}}, "set XDG_CACHE_HOME to a folder that can be"),
        (
            {
                "providers": [
                    {
                        "operation": "block_sparse",
                        "provider": "native",
                        "device": "cpu",
                        "why_not": "not built",
                    }
                ]
            },
            "block_sparse by native does not run: not built; `make demo`",
        ),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_doctor_says_what_to_do_about_what_it_found(changed, said):
    fine = {
        "backend_registered": True,
        "devices": [{"device": "cpu"}],
        "compiler": "g++",
        "caches": {},
        "providers": [],
    }
    assert len(list(_next(fine))) == 1
    first, _ = _next({**fine, **changed})
    assert first.startswith(said)


def test_progress_stays_off_stdout_and_reports_the_end(capsys):
    with progress("work", total=3) as advance:
        for step in ("a", "b", "c"):
            advance(step)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("work 3/3")
    assert len(said.err.splitlines()) == 1


def test_progress_says_at_once_what_is_waited_for(capsys):
    with progress("work", total=2) as advance:
        advance("compiling a", done=0)
        said = capsys.readouterr().err
    assert said.startswith("work 0/2")
    assert said.endswith("compiling a\n")
