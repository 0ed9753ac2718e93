"""`lipass play`: what it refuses, on one line, and that it ends when it is interrupted."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request

import pytest

from lipass.cli import main

pytest.importorskip("uvicorn")

WORLD = """
    class Visit:
        pass

    class World:
        title, chunk_frames, size, fps, look = "mine", 2, (4, 4), 10.0, 30
        words, presets, room, rooms = {}, ("all",), 0, 1

        def compile(self, side, say):
            pass

        def visit(self, room):
            return Visit()

    def broken():
        raise RuntimeError("no weights")

    def other():
        return 7
"""


@pytest.fixture
def target(tmp_path):
    """Return a file of worlds."""
    path = tmp_path / "my_worlds.py"
    path.write_text(textwrap.dedent(WORLD))
    return path


def said(capsys, *arguments):
    code = main(["play", *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--port", "70000"), "--port must be from 0 to 65535, got 70000"),
        (("--visitors", "0"), "--visitors must be from 1 to 10000, got 0"),
        (("--idle", "0"), "--idle must be from 1"),
        (("--keep", "-1"), "--keep must be from 0 to 86400"),
        (("--ray", "0"), "--ray must be from 1 to 10000, got 0"),
        (("--ray", "2", "--port", "0"), "--port must be a number of its own with --ray, got 0"),
        (("--threads", "0"), "--threads must be from 1"),
        (("nowhere.py:build",), "the file of TARGET must exist"),
    ],
)
def test_wrong_usage_is_one_line(capsys, arguments, why):
    code, line = said(capsys, "--port", "0", *arguments)
    assert code == 2
    assert why in line


def test_missing_extra_says_what_to_install(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    code, line = said(capsys)
    assert code == 1
    assert "got no uvicorn" in line
    assert "-m pip install 'lipass[play]'" in line


def test_port_in_use_is_told_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, line = said(capsys, "--port", str(taken.getsockname()[1]))
    assert code == 1
    assert "Address already in use; --port 0 takes a free port" in line


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken", "must build a world, and raised RuntimeError at my_worlds.py"),
        ("other", "must return a lipass.play.world.World, got int without title, chunk_frames"),
        ("Visit", "got Visit without title"),
        ("missing", "must define the callable 'missing'"),
    ],
)
def test_what_is_no_world_is_told(capsys, target, name, why):
    assert why in said(capsys, f"{target}:{name}", "--port", "0")[1]


def test_serves_until_it_is_interrupted(target):
    command = [sys.executable, "-c", "import sys; from lipass.cli import main; sys.exit(main())"]
    command += ["play", f"{target}:World", "--port", "0", "--host", "127.0.0.1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        address = process.stdout.readline().strip()
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert b"<title>lipass play</title>" in answer.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert errors.splitlines() == ["lipass play: open this address; Ctrl-C ends it"]


def test_ray_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, line = said(capsys, "--ray", "2")
    assert code == 1
    assert "--ray needs Ray Serve, got none; run pip install 'lipass[ray]'" in line
