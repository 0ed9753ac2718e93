"""The day on a GPU, tried on a CPU: every part on tiny shapes with stand-ins for its kernels."""

import json
import os
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.gpu import __main__ as day
from benchmarks.gpu import about, blocks, right, speed, train
from benchmarks.gpu.part import Part
from lipass.examples.tinyworld.learner import working_copy
from lipass.examples.tinyworld.model import ModelConfig, TinyWorld, tokenize
from lipass.examples.tinyworld.rollout import roll_out
from lipass.kernels.block_sparse import reference

ROOT = Path(__file__).parents[2]


def rows(main, tmp_path, *arguments):
    out = tmp_path / "part.json"
    code = main([*arguments, "--out", str(out), "--seconds", "60", "--dry"])
    document = json.loads(out.read_text())
    assert document["dry"] is True
    return code, document


@pytest.mark.parametrize("name", ["tma", "triton", "gluon", "fa4", "planning", "operator"])
def test_what_is_checked_is_right_by_its_stand_in(name, tmp_path):
    code, document = rows(right.main, tmp_path, name)
    assert code == 0
    assert all(row["right"] for row in document["rows"])


@pytest.mark.parametrize("name", ["gluon", "fa4"])
def test_what_nobody_has_seen_run_is_alone_and_in_front(name):
    names = [part.name for part in day.PARTS]
    assert names.index(f"right_{name}") < names.index("right_tma")
    alone = next(group for group in day._groups(list(day.PARTS)) if len(group) == 1
                 and group[0].name == f"right_{name}")  # fmt: skip
    assert alone[0].limit_s <= 90


class OnGpu(Part):
    """A part that is no dry run, on the host."""

    def __init__(self, argv):
        super().__init__([*argv, "--dry"])
        self.dry = False


def on_gpu(name, tmp_path, monkeypatch, unfit="", outcome=""):
    made = SimpleNamespace(
        unfit=lambda kind: unfit or None, why_not=lambda kind: outcome or None,
        block_sparse_attention=reference.block_sparse_attention,
    )  # fmt: skip
    tried = []

    def try_out(name, kind, limit_s):
        tried.append(limit_s)
        return outcome

    real = right.registry.module_of

    def module_of(operation, provider):
        return made if operation == "block_sparse" else real(operation, provider)

    monkeypatch.setattr(right, "Part", OnGpu)
    monkeypatch.setattr(right.probe, "try_out", try_out)
    monkeypatch.setattr(
        right, "CALLS", {"one": ((1, 1, 5, (2, 8, 8), (2, 8, 8), (2, 4, 4)), 16, False)}
    )
    monkeypatch.setattr(right.registry, "module_of", module_of)
    out = tmp_path / "part.json"
    code = right.main([name, "--out", str(out), "--seconds", "90"])
    return code, json.loads(out.read_text())["rows"], tried


def test_a_contender_is_tried_apart_before_it_is_called(tmp_path, monkeypatch):
    code, rows, tried = on_gpu("gluon", tmp_path, monkeypatch)
    assert code == 0
    assert len(tried) == 1
    assert 0 < tried[0] <= 65
    assert [row["right"] for row in rows] == [True] * len(rows)
    assert rows[0]["call"] == "in a process of its own"
    assert len(rows) > 2


def test_a_contender_that_hangs_is_not_called(tmp_path, monkeypatch):
    code, rows, _ = on_gpu("gluon", tmp_path, monkeypatch, outcome="did not end")
    assert code == 1
    assert [(row["right"], row["failed"]) for row in rows] == [(False, "did not end")]


def test_a_contender_that_cannot_run_here_is_left_out(tmp_path, monkeypatch):
    code, rows, tried = on_gpu("fa4", tmp_path, monkeypatch, unfit="needs another chip")
    assert (code, tried) == (0, [])
    assert [row["left_out"] for row in rows] == ["needs another chip"]


def test_a_kernel_that_is_wrong_fails_the_part(tmp_path, monkeypatch):
    monkeypatch.setattr(right.Problem, "expected", lambda p, *_: (p.q.double(), p.q[..., 0]))
    monkeypatch.setattr(right, "CALLS", dict(list(right.CALLS.items())[:1]))
    code, document = rows(right.main, tmp_path, "tma")
    assert code == 1
    assert not any(row["right"] for row in document["rows"])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_speed_has_a_row_for_each_form_of_a_case(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "CASES", dict(list(speed.CASES.items())[:2]))
    code, document = rows(speed.main, tmp_path)
    assert code == 0
    dense, sparse, *_ = document["rows"]
    assert dense["form"] == "dense"
    assert list(dense["failed"]) == ["cudnn"]  # what cannot run is told, and the rest is timed
    assert sparse["failed"] == {}
    assert {"flex", "flex_tma", "flex_flash", "reference, tiles", "reference, runs"} == set(
        sparse["ratio"]
    )
    assert {"plan", "plan, known means", "operator"} < set(sparse["ms"])


def test_warming_up_times_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "CASES", dict(list(speed.CASES.items())[:1]))
    code, document = rows(speed.main, tmp_path, "--warm")
    assert code == 0
    assert len(document["rows"]) == 2


@pytest.mark.parametrize("name", ["hy-worldplay", "matrix-game-3"])
def test_blocks_have_a_row_for_each_preset(name, tmp_path, monkeypatch):
    presets = ["all" if name == "hy-worldplay" else "sparse"]
    monkeypatch.setattr(blocks, "PRESETS", presets)
    code, document = rows(blocks.main, tmp_path, name)
    assert code == 0
    assert [row["preset"] for row in document["rows"]] == presets
    assert document["rows"][-1]["ran"]


def test_a_world_is_trained_and_rolled_out_and_its_weights_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PRESETS", ("off",))
    monkeypatch.setattr("lipass.examples.tinyworld.train._LEAST_S", 0.1)
    monkeypatch.setattr("lipass.examples.tinyworld.train._LEAST_FINISHING_S", 0.0)
    monkeypatch.setattr("lipass.examples.tinyworld.train_scores.PATHS", ("forward/back",))
    code, document = rows(train.main, tmp_path, "base")
    trained, demo = document["rows"]
    assert (code, trained["trained"], trained["model"]) == (0, True, "base")
    assert document["card"]["steps"].keys() == document["loss"].keys()
    assert (demo["preset"], demo["trajectory"], demo["speedup_vs_off"]) == ("off", "left/right", 1)
    weights = tmp_path / "base.safetensors"
    assert load_file(weights)["head.weight"].dtype == torch.float16
    assert weights.stat().st_size < 16 * 2**20
    assert (tmp_path / "base-world-curve.json").exists()


def test_a_world_in_the_precision_of_the_kernels_is_rolled_out_by_the_same_loop():
    torch.manual_seed(0)
    world = TinyWorld(ModelConfig(rows=2, columns=2, width=32, heads=1, blocks=1, text_width=8))
    for parameter in world.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given, w2c = torch.randn(8, 16, 2, 2), torch.eye(4).repeat(16, 1, 1)
    tokens, walls = tokenize("a room")[None], torch.randn(16, 16, 2, 2)
    made = []
    for model in (world, train.Narrow(working_copy(world, torch.bfloat16))):
        text = getattr(model, "world", model).text(tokens)
        made.append(roll_out(model, text, given, w2c, walls, seed=0).latents)
    assert made[1].dtype == torch.float32
    assert not torch.equal(*made)
    torch.testing.assert_close(made[1], made[0], atol=0.1, rtol=0.05)


def test_a_streaming_world_goes_on_from_its_own_weights(tmp_path):
    part = Part(["stream", "--out", str(tmp_path / "part.json"), "--dry"])
    training = train._training(part, "stream", tmp_path, 60.0)
    assert training.init.name == "stream.safetensors"
    assert training.recipe.shares.keys() == {"walks", "stream", "score"}
    assert train._training(part, "base", tmp_path, 60.0).init.name == "small.safetensors"


def test_a_sampler_begins_with_small_and_says_what_it_names(tmp_path, monkeypatch):
    given = []

    def run(training):
        given.append(training)
        named = {"1 steps": 0.1, "4 steps": 0.8}
        return {"reached": True, "share_of_pictures_named": named, "loss": {}}

    monkeypatch.setattr("lipass.examples.tinyworld.train.Training.run", run)
    code, document = rows(train.main, tmp_path, "sampler")
    assert code == 0
    assert document["rows"] == [
        {"trained": True, "model": "sampler", "reached": True, "1 steps": 0.1, "4 steps": 0.8}
    ]
    (training,) = given
    assert training.init.name == "small.safetensors"
    assert training.recipe.pixels == 64
    assert training.recipe.shares.keys() == {"rooms", "sampler", "score"}


def test_the_newest_weights_come_back_whatever_stops_the_training(tmp_path):
    part = Part(["base", "--out", str(tmp_path / "part.json"), "--dry"])
    (made := tmp_path / "work").mkdir()
    training = train._training(part, "base", made, 60.0)
    train.copy_latest(training, tmp_path)
    assert not (tmp_path / "base.safetensors").exists()
    for number, name in enumerate(("world-average", "base", "unseen-average")):
        path = made / f"{name}.safetensors"
        path.write_text(name)
        os.utime(path, (number, number))
        train.copy_latest(training, tmp_path)
        assert (tmp_path / "base.safetensors").read_text() == name


def test_weights_lie_under_out_before_the_call_ends(tmp_path, monkeypatch):
    """A call that is cut packs nothing."""
    out, folder, made = (tmp_path / name for name in ("out", "parts", "work"))
    monkeypatch.setenv("OUT", str(out))
    part = Part(["base", "--out", str(folder / "part.json"), "--dry"])
    training = train._training(part, "base", made, 60.0)
    made.mkdir()
    (made / "world-average.safetensors").write_text("average")
    (made / "world-curve.json").write_text("{}")
    (made / "base.json").write_text("{}")
    train.copy_latest(training, folder)
    assert [path.name for path in out.iterdir()] == ["base.safetensors"]
    assert {path.name for path in folder.iterdir()} == {
        "base.safetensors", "base-world-curve.json", "base-card.json"
    }  # fmt: skip

    def cut(path, copied):
        copied.write_text("half")
        raise KeyboardInterrupt

    (made / "base.safetensors").write_text("halves")
    monkeypatch.setattr(train.shutil, "copy2", cut)
    with pytest.raises(KeyboardInterrupt):
        train.copy_latest(training, folder)
    assert (out / "base.safetensors").read_text() == "average"


def test_a_training_that_was_cut_goes_on_in_the_next_call(tmp_path, monkeypatch):
    begun = []

    def run(training):
        begun.append((training.out, training.seconds, training.done()))
        training.out.mkdir(parents=True, exist_ok=True)
        (training.out / "done.json").write_text('{"walks": 40.0}')
        if len(begun) == 1:
            raise KeyboardInterrupt
        return {"reached": True, "db_to_the_renderer": {}, "loss": {}}

    monkeypatch.setattr("lipass.examples.tinyworld.train.Training.run", run)
    monkeypatch.setattr(train, "Part", OnGpu)
    monkeypatch.setattr(train, "ROOT", tmp_path)
    job = ["stream", "--out", str(tmp_path / "part.json"), "--seconds", "90"]
    with pytest.raises(KeyboardInterrupt):
        train.main(job)
    assert train.main(job) == 0
    (first, given, nothing), (again, more, done) = begun
    assert (nothing, done) == ({}, {"walks": 40.0})
    assert first == again
    assert first.parent == tmp_path / "build/tinyworld"
    assert more == pytest.approx(given + 40, abs=5)
    assert not first.exists()  # it has ended, and the next one begins anew


def test_what_cannot_be_trained_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    code, document = rows(train.main, tmp_path)
    (row,) = document["rows"]
    assert (code, row["trained"]) == (0, False)
    assert "safetensors" in row["reason"]


def test_few_files_go_to_out(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert day.main(["--only", "about", "--dry", "--seconds", "60"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"day.json", "parts.zip"}
    with zipfile.ZipFile(tmp_path / "out/parts.zip") as archive:
        assert set(archive.namelist()) == {"about.json", "about.log", "day.json"}


def test_the_world_to_train_is_chosen(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(day, "_run", lambda group, *_: ran.extend(group) or {})
    assert day.main(["--only", "train", "--train", "stream", "--out", str(tmp_path)]) == 0
    assert [part.arguments for part in ran] == [("stream",)]


def test_machine_is_described(tmp_path):
    _, document = rows(about.main, tmp_path)
    assert {"python", "torch"} <= set(document["versions"])


HANGING = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("begun", flush=True)
time.sleep(600)
"""


def test_a_part_that_hangs_costs_only_itself(tmp_path, monkeypatch):
    package = tmp_path / "benchmarks/gpu"
    package.mkdir(parents=True)
    (package / "hangs.py").write_text(HANGING)
    (package / "fails.py").write_text("raise SystemExit('no such device')")
    (package / "works.py").write_text("import sys; print(sys.argv)")
    monkeypatch.setattr(day, "_importable", lambda links: str(tmp_path))
    monkeypatch.setattr(day, "ROOT", tmp_path)
    parts = (day.Part("hangs", "hangs", 1.5), day.Part("fails", "fails", 20, beside=True),
             day.Part("works", "works", 20), day.Part("late", "works", 20))  # fmt: skip
    monkeypatch.setattr(day, "PARTS", parts)
    begin = time.monotonic()
    assert day.main(["--out", str(tmp_path / "out"), "--seconds", "30"]) == 1
    assert time.monotonic() - begin < 25
    found = json.loads((tmp_path / "out/day.json").read_text())["parts"]
    assert {name: said["state"] for name, said in found.items()} == {
        "hangs": "stopped after 2 s", "fails": "failed with 1", "works": "done", "late": "done",
    }  # fmt: skip
    assert "no such device" in found["fails"]["tail"]
    assert "begun" in found["hangs"]["tail"]


def test_parts_without_time_are_left_out(tmp_path):
    assert day.main(["--only", "about", "--out", str(tmp_path), "--seconds", "1"]) == 1
    found = json.loads((tmp_path / "day.json").read_text())
    assert found["parts"]["about"]["state"] == "no time was left"


BARE = """
import sys
sys.meta_path = [one for one in sys.meta_path if "editable" not in repr(one).lower()]
for name in ("rich", "matplotlib", "PIL", "safetensors", "diffusers", "einops", "transformers",
             "pytest", "hypothesis", "peft", "av", "starlette"):
    sys.modules[name] = None
from benchmarks.gpu import about, blocks, right, speed, train
import lipass, lipass.kernels, lipass.passes, lipass.examples
from torch._dynamo.backends.registry import lookup_backend
lookup_backend("light_interaction")
print(lipass.__file__)
"""


def test_a_checkout_is_enough(tmp_path):
    """Nothing is installed on the machine but torch and what torch needs."""
    path = day._importable(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", BARE], env=day._environment(path), cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "lipass/__init__.py")


def test_torch_finds_the_backend_of_a_checkout(tmp_path):
    day._importable(tmp_path)
    (found,) = metadata.distributions(path=[str(tmp_path)])
    points = {(one.group, one.name): one.value for one in found.entry_points}
    assert points["torch_dynamo_backends", "light_interaction"].startswith("lipass.backend:")


def test_what_hung_is_not_called_again(tmp_path, monkeypatch):
    package = tmp_path / "benchmarks" / "gpu"
    package.mkdir(parents=True)
    (package / "right.py").write_text(
        "import os, sys\nif 'bad' in sys.argv: os.abort()\nsys.exit(1)"
    )
    (package / "speed.py").write_text("import sys; print(sys.argv)")
    monkeypatch.setattr(day, "_importable", lambda links: str(tmp_path))
    monkeypatch.setattr(day, "ROOT", tmp_path)
    parts = (day.Part("right_bad", "right", 20, ("bad",)), day.Part("right_off", "right", 20),
             day.Part("speed", "speed", 20))  # fmt: skip
    monkeypatch.setattr(day, "PARTS", parts)
    day.main(["--out", str(tmp_path / "out"), "--seconds", "60"])
    parts = json.loads((tmp_path / "out/day.json").read_text())["parts"]
    assert [parts[f"right_{name}"]["state"] for name in ("bad", "off")] == [
        "failed with -6", "failed with 1",
    ]  # fmt: skip
    assert "--without=bad" in parts["speed"]["tail"]
    assert "--without=off" not in parts["speed"]["tail"]


def test_times_taken_beside_others_decide_nothing(tmp_path, monkeypatch):
    package = tmp_path / "benchmarks" / "gpu"
    package.mkdir(parents=True)
    cache = tmp_path / "cache" / "lipass"
    cache.mkdir(parents=True)
    (package / "one.py").write_text(
        "import pathlib, sys\n"
        f"path = pathlib.Path({str(cache)!r})\n"
        "for what in ('gpu_rates', 'gpu_providers', 'probe_gluon'):\n"
        "    (path / f'{what}_{sys.argv[1]}.json').write_text('1')\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(day, "_importable", lambda links: str(tmp_path))
    monkeypatch.setattr(day, "ROOT", tmp_path)
    parts = (day.Part("a", "one", 20, ("a",)), day.Part("b", "one", 20, ("b",)),
             day.Part("c", "one", 20, ("c",), beside=True))  # fmt: skip
    monkeypatch.setattr(day, "PARTS", parts)
    assert day.main(["--out", str(tmp_path / "out"), "--seconds", "60"]) == 0
    assert {path.stem for path in cache.iterdir()} == {
        "gpu_rates_a", "gpu_providers_a", "probe_gluon_a", "probe_gluon_b", "probe_gluon_c",
    }  # fmt: skip


def test_a_provider_that_is_left_out_says_why(tmp_path):
    try:
        Part(["--out", str(tmp_path / "part.json"), "--dry", "--without", "tma"])
        assert "before this one" in right.registry.module_of("block_sparse", "tma")
    finally:
        right.registry._left_out.clear()
        right.registry.module_of.cache_clear()


def test_a_call_that_breaks_while_it_is_timed_leaves_the_others(tmp_path):
    part, calls = Part(["--out", str(tmp_path / "part.json"), "--dry"]), iter(range(99))

    def breaks():
        if next(calls):
            raise RuntimeError("illegal access")

    times, failed = part.times_ms({"breaks": breaks, "works": lambda: None})
    assert list(times) == ["works"]
    assert failed == {"breaks": "RuntimeError: illegal access"}


def test_a_preset_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def options_of(preset, family):
        return {"preset": "none such" if preset == "exact" else preset}

    monkeypatch.setattr(blocks, "PRESETS", ["exact", "off"])
    monkeypatch.setattr(blocks, "options_of", options_of)
    code, document = rows(blocks.main, tmp_path, "matrix-game-3")
    assert code == 1
    assert "none such" in document["rows"][0]["failed"]
    assert document["rows"][1]["speed"] == 1
