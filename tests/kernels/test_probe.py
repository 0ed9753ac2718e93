"""A kernel that nobody has seen run is tried in a process that may hang, crash or be wrong."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from lipass.kernels import chip, fastest, probe, registry
from lipass.kernels.block_sparse import reference
from lipass.kernels.block_sparse.kind import Kind
from lipass.kernels.fastest import GpuKind

CUDA = torch.device("cuda", 0)
KIND = Kind(CUDA, torch.bfloat16, 128, 128, 128, False)
ON_HOST = GpuKind(torch.device("cpu"), torch.float32, 16, 64)


@pytest.fixture(autouse=True)
def _nothing_known(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(chip, "name", lambda device: "a GPU")
    monkeypatch.setattr(probe, "_outcomes", {})
    monkeypatch.setattr(probe, "_trusted", set())


def says(monkeypatch, script):
    """Let a script stand for the process that tries a provider; give the list of its runs."""
    runs = []

    def command(provider, kind):
        runs.append((provider, kind))
        return [sys.executable, "-c", script]

    monkeypatch.setattr(probe, "_command", command)
    return runs


HANGS = "import time; print('begun', flush=True); time.sleep(600)"
OUTCOMES = {
    "passes": ("print('begun')", "", True),
    "hangs": (HANGS, "did not end within the 2 s", True),
    "hangs before it begins": ("import time; time.sleep(600)", "did not begin within", False),
    "crashes": ("import os; print('begun', flush=True); os.abort()", "failed with -6", True),
    "raises": ("print('begun'); raise ValueError('no such unit')", "no such unit", True),
    "is wrong": ("print('begun'); print('\"tails: off by 3\"')", "wrong: tails: off by 3", True),
    "finds no memory": ("raise SystemExit('out of memory')", "begin: out of memory", False),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_whatever_a_probe_does_costs_its_limit_at_most_and_is_told(name, monkeypatch):
    script, reason, lasts = OUTCOMES[name]
    runs = says(monkeypatch, script)
    assert "not tried on this GPU yet" in probe.why_not("gluon", KIND)
    begin = time.monotonic()
    why = probe.try_out("gluon", KIND, limit_s=2.0 if "hangs" in name else 60.0)
    assert time.monotonic() - begin < 30
    assert reason in why
    assert bool(why) == bool(reason)
    assert (probe.why_not("gluon", KIND) or "") == why
    # Once a process; and once a machine, unless it could not begin.
    assert probe.try_out("gluon", KIND) == why
    probe._outcomes.clear()
    if lasts:
        assert (probe.why_not("gluon", KIND) or "") == why
        assert probe.try_out("gluon", KIND) == why
        assert len(runs) == 1
    else:
        assert "not tried" in probe.why_not("gluon", KIND)


def test_outcomes_hold_for_what_was_tried(monkeypatch):
    says(monkeypatch, "print('begun')")
    assert probe.try_out("gluon", KIND) == ""
    assert probe.why_not("gluon", KIND) is None
    for other in ({"dim": 64}, {"dtype": torch.float16}, {"k_volume": 64}):
        assert "not tried" in probe.why_not("gluon", KIND._replace(**other))
    assert "not tried" in probe.why_not("another", KIND)
    probe._outcomes.clear()
    monkeypatch.setattr(chip, "name", lambda device: "another GPU")
    assert "not tried" in probe.why_not("gluon", KIND)


def test_a_process_is_told_what_to_try():
    command = probe._command("gluon", GpuKind(CUDA, torch.bfloat16, 128, 64))
    assert command[1:] == [
        "-m",
        "lipass.kernels.probe",
        "gluon",
        "cuda:0",
        "bfloat16",
        "128",
        "64",
    ]


def test_no_process_is_begun_by_asking(monkeypatch):
    runs = says(monkeypatch, "print('begun')")
    probe.why_not("gluon", KIND)
    with probe.trusted("gluon"):
        assert probe.why_not("gluon", KIND) is None
    assert "not tried" in probe.why_not("gluon", KIND)
    assert runs == []


def small(monkeypatch):
    monkeypatch.setattr(probe, "_PROBLEMS", {
        name: probe._Problem(min(one.text, 9), (2, 5, 6), (2, 5, 6), one.in_runs, one.known)
        for name, one in probe._PROBLEMS.items()
    })  # fmt: skip


def provider(monkeypatch, attend):
    made = SimpleNamespace(why_not=lambda kind: None, block_sparse_attention=attend)
    monkeypatch.setattr(registry, "module_of", lambda operation, name: made)


def test_what_is_right_passes(monkeypatch, capsys):
    small(monkeypatch)
    monkeypatch.setattr(probe, "_REPEATS", 1)
    monkeypatch.setattr(probe, "_HEADS", 1)
    assert probe.wrong("reference", ON_HOST, 1, 2) == ""
    assert probe.main(["reference", "cpu", "float32", "16", "64"]) == 0
    assert capsys.readouterr().out.strip() == "begun"


def test_a_process_finds_the_package_as_this_one_does():
    kind = ON_HOST._replace(dim=8)
    why, lasts = probe._run(probe._command("nobody", kind), 120.0)
    assert (why[:19], lasts) == ("was tried and is wr", True)
    assert "No module named" in why
    assert "nobody" in why


def test_what_is_wrong_in_one_call_is_named(monkeypatch):
    small(monkeypatch)
    calls = []

    def attend(q, keys, values, plan, **options):
        out, lse = reference.block_sparse_attention(q, keys, values, plan, **options)
        calls.append(plan.q_grid.tile)
        return (out + 1e-3, lse) if len(calls) == 7 else (out, lse)

    provider(monkeypatch, attend)
    why = probe.wrong("made up", ON_HOST, 3, 1)
    assert why == "whole runs: call 3 of the same tensors gives another output"


@pytest.mark.parametrize("part", ["output", "log-sum-exp"])
def test_what_is_wrong_in_every_call_is_named(part, monkeypatch):
    small(monkeypatch)

    def attend(*args, **options):
        out, lse = reference.block_sparse_attention(*args, **options)
        return (out * 1.1, lse) if part == "output" else (out, lse / 0.6931471805599453)

    provider(monkeypatch, attend)
    assert probe.wrong("made up", ON_HOST, 1, 1).startswith("whole tiles: head 0 is off by")


def test_who_takes_no_call_does_not_pass(monkeypatch):
    small(monkeypatch)
    refuses = SimpleNamespace(why_not=lambda kind: "never")
    monkeypatch.setattr(registry, "module_of", lambda operation, name: refuses)
    assert probe.wrong("made up", ON_HOST, 1, 1) == "it takes no call of the kind"


def test_without_a_cache_folder_it_is_tried_in_each_process(monkeypatch):
    runs = says(monkeypatch, "print('begun')")
    monkeypatch.setattr(fastest, "_path", lambda kind, what: fastest.Path("/proc/none/x.json"))
    for _ in range(2):
        assert probe.try_out("gluon", KIND) == ""
        probe._outcomes.clear()
    assert len(runs) == 2
