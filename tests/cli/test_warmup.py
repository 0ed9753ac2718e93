"""`lipass warmup`: what it compiles, a later process finds."""

import json
import os
import subprocess
import sys

import pytest

from lipass.cli import main

RUN = "import sys; from lipass.cli import main; sys.exit(main(sys.argv[1:]))"


def in_a_process(*arguments, cache):
    done = subprocess.run(
        [sys.executable, "-c", RUN, "warmup", *arguments, "--json"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["rows"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["exact", "sparse"])
def test_later_process_finds_everything(world, preset, tmp_path):
    # Where the machine is busy, each process measures other constants and may decide otherwise.
    given = [world, "--preset", preset, "-o", "disable=('attend-pieces',)"]
    [first], said = in_a_process(*given, cache=tmp_path / "cache")
    [again], _ = in_a_process(*given, cache=tmp_path / "cache")
    assert (first["compiled"] > 0, first["cached"]) == (True, 0)
    assert (again["compiled"], again["cached"]) == (0, first["compiled"])
    assert f"warmup {preset}: call 1/1" in said


@pytest.mark.slow
def test_presets_are_compiled_side_by_side(world, tmp_path):
    rows, _ = in_a_process(
        world, "--preset", "exact", "--preset", "off", "-o", "inner=eager", cache=tmp_path
    )
    assert [row["preset"] for row in rows] == ["exact", "off"]
    assert all(row["calls"][0]["graphs"] for row in rows)


def test_every_size_of_a_list_is_compiled(world, tmp_path, capsys):
    path, _ = world.split(":")
    with open(path, "a") as file:
        file.write(
            "\ndef two():\n    model, calls = decode()\n"
            "    longer = torch.randn(1, 2, 128, 16)\n"
            "    return model, [calls, (*calls[:3], longer)]\n"
        )
    assert main(["warmup", f"{path}:two", "-o", "inner=eager", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert [len(call["graphs"]) for call in row["calls"]] == [1, 1]


def test_function_that_runs_by_itself(world, capsys):
    path, _ = world.split(":")
    with open(path, "a") as file:
        file.write(
            "\ndef chunk():\n    model, call = decode()\n"
            "    options = {'inner': 'eager'}\n"
            "    torch.compile(model, backend='light_interaction', options=options)(*call)\n"
        )
    assert main(["warmup", f"{path}:chunk", "--run"]) == 0
    assert f"{path}:chunk: call 1/1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [["--run", "--preset", "all"], ["--jobs", "0"], ["--threads", "-1"]]
)
def test_what_cannot_be_asked_for_is_usage(world, given, capsys):
    assert main(["warmup", world, *given]) == 2
    assert "lipass warmup:" in capsys.readouterr().err


def test_what_a_target_prints_stays_out_of_the_json(world, capsys):
    path, _ = world.split(":")
    with open(path, "a") as file:
        file.write(
            "\ndef loud():\n    model, call = decode()\n    print('chunk 1')\n"
            "    options = {'inner': 'eager'}\n"
            "    torch.compile(model, backend='light_interaction', options=options)(*call)\n"
        )
    assert main(["warmup", f"{path}:loud", "--run", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["schema_version"] == 1
    assert "chunk 1" in told.err
