"""The gate on a GPU: what it assumes, what is measured and kept, and what slots and waves cost."""

import json
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import make_case

from lipass.kernels import chip, cost, fastest, gpu_calibration, probe, registry
from lipass.kernels.block_sparse import reference
from lipass.kernels.calibration import Form, Rates
from lipass.kernels.fastest import GpuKind
from lipass.kernels.formulas import work_of
from lipass.kernels.plan import BlockGrid, KvLayout
from lipass.kernels.select.api import selected_blocks

CUDA = torch.device("cuda", 0)
KIND = GpuKind(CUDA, torch.bfloat16, 128, 128)
RATES = Rates(Form(0.02, 500e9, 1e9), None, Form(0.1, 300e9, 2e9))


@pytest.fixture(autouse=True)
def _gpu(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(chip, "processors", lambda device: 132)
    monkeypatch.setattr(chip, "why_not", lambda device: None)
    monkeypatch.setattr(chip, "capability", lambda device: (9, 0))
    monkeypatch.setattr(chip, "name", lambda device: "a GPU")
    monkeypatch.setattr(gpu_calibration, "_known", {})
    monkeypatch.setattr(fastest, "_orders", {})


def predicted(text, history, budget, batch=2, heads=16):
    grids = (1, 1, text), (history, 30, 52), (4, 30, 52)
    layout = KvLayout.build(("text", "history", "current"), grids, (4, 8, 4))
    q_grid = layout.segments[-1].grid
    width = selected_blocks(layout, q_grid, budget, "decode", 0)
    shape = (batch, heads, q_grid.tokens, 128)
    return cost.predict(shape, torch.bfloat16, CUDA, layout, q_grid, width), width / layout.blocks


def test_text_and_current_keys_and_empty_slots_are_counted():
    """A budget of 0.3 of 12 latents visits more than half of the keys, in more slots than keys."""
    found, density = predicted(929, 8, 0.3)
    assert 0.5 < density < 0.6
    assert found.sparse_ms > 0.9 * found.dense_ms
    assert predicted(929, 8, 0.5)[0].why_dense
    assert not predicted(929, 24, 0.175)[0].why_dense


def test_slots_without_a_token_and_the_last_wave_are_computed():
    layout = KvLayout.build(("current",), ((4, 9, 5),), (4, 8, 4))
    q_grid = BlockGrid((4, 9, 5), (4, 8, 4))
    flops, moved = work_of(128, 2, layout, q_grid, "sparse", 3, True, (4, 4))
    assert flops == 4 * 128 * (4 * 128) * (3 * 128)
    assert moved == 2 * 128 * 2 * 180
    assert work_of(128, 2, layout, q_grid, "sparse", 3, True, (4, 3))[0] == 1.5 * flops


def test_what_was_measured_replaces_what_is_assumed(monkeypatch):
    assumed, _ = predicted(929, 24, 0.3)
    monkeypatch.setitem(gpu_calibration._known, KIND, RATES)
    measured, _ = predicted(929, 24, 0.3)
    assert measured.joined_ms > assumed.joined_ms
    assert cost.ASSUMED.joined.flops_per_ms > RATES.joined.flops_per_ms


@pytest.fixture
def clock(monkeypatch):
    """Let calls run once, on the host, and take what known constants say."""
    monkeypatch.setattr(gpu_calibration, "_HEADS", 1)
    monkeypatch.setattr(gpu_calibration, "_SIZE", (8, 8))
    monkeypatch.setattr(gpu_calibration, "_TEXT_TOKENS", 32)
    monkeypatch.setattr(registry, "choose", lambda operation, device, name, asking: _Choice(name))
    case = gpu_calibration._Case
    found = SimpleNamespace(slower={}, ran=[])

    class Timed(case):
        def sparse(self, provider):
            if (slower := found.slower.get(provider, 1.0)) is None:
                raise ValueError(f"{provider} refuses")
            found.next = self.work("sparse"), RATES.sparse, slower, provider
            return super().sparse(provider)

        def joined(self):
            found.next = self.work("joined"), RATES.joined, 1.0, "sdpa"
            return super().joined()

    def ms_of(call):
        call()
        (flops, moved), form, slower, name = found.next
        found.ran.append(name)
        return slower * (form.fixed_ms + flops / form.flops_per_ms + moved / form.bytes_per_ms)

    monkeypatch.setattr(gpu_calibration, "_Case", Timed)
    monkeypatch.setattr(gpu_calibration, "_burst_ms", ms_of)
    found.ms_of = ms_of
    return found


class _Choice:
    """Whatever was asked for, by the definition."""

    def __init__(self, name):
        self.name, self.module = name, reference


HOST = GpuKind(torch.device("cpu"), torch.float32, 16, 64)


@pytest.mark.parametrize("in_runs", [False, True])
def test_measuring_fits_the_times_of_both_forms(in_runs, clock):
    kind = HOST._replace(in_runs=in_runs)
    found, times = gpu_calibration.measure(kind, ["tma"], clock.ms_of)
    assert clock.ran == ["sdpa", "tma"] * 6
    assert list(times) == ["tma"]
    for form, wanted in ((found.joined, RATES.joined), (found.sparse, RATES.sparse)):
        assert form == pytest.approx(wanted, rel=1e-3)


def test_the_gate_reads_the_constants_of_the_fastest_provider(clock):
    clock.slower = {"tma": 1.5, "triton": 3.0, "gluon": 1.0}
    found, times = gpu_calibration.measure(HOST, ["tma", "triton", "gluon"], clock.ms_of)
    assert found.sparse == pytest.approx(RATES.sparse, rel=1e-3)
    assert fastest.order(times) == ("gluon", "tma", "triton")


def test_who_refuses_what_is_measured_is_left_out(clock):
    clock.slower = {"tma": None, "triton": 2.0}
    found, times = gpu_calibration.measure(HOST, ["tma", "triton"], clock.ms_of)
    assert list(times) == ["triton"]
    assert found.sparse.fixed_ms == pytest.approx(2 * RATES.sparse.fixed_ms, rel=1e-3)
    clock.slower = {"tma": None}
    with pytest.raises(ValueError, match="tma: tma refuses"):
        gpu_calibration.measure(HOST, ["tma"], clock.ms_of)


@pytest.mark.parametrize("outcome", ["", "did not end within the 120 s that trying it may take"])
def test_a_contender_is_measured_once_its_probe_has_passed(outcome, clock, monkeypatch, caplog):
    tried = []

    def try_out(name, kind):
        tried.append(name)
        return outcome

    def module_of(operation, name):
        def why_not(kind):
            if name == "gluon":
                return (outcome if tried else "not tried") or None
            return "not here" if name == "triton" else None

        return SimpleNamespace(unfit=lambda kind: None, why_not=why_not)

    monkeypatch.setattr(probe, "try_out", try_out)
    monkeypatch.setattr(registry, "module_of", module_of)
    monkeypatch.setattr(registry, "_CONTENDERS", {("block_sparse", "cpu"): ("gluon",)})
    monkeypatch.setitem(registry._PROVIDERS, ("block_sparse", "cpu"), ("tma", "triton"))
    clock.slower = {"tma": 2.0}
    assert gpu_calibration.calibrate(HOST) is not None
    assert tried == ["gluon"]
    assert fastest.order_of(HOST) == (("tma",) if outcome else ("gluon", "tma"))
    assert ("provider gluon is not used" in caplog.text) == bool(outcome)
    # Nothing is tried or timed twice.
    clock.ran.clear()
    gpu_calibration._known.clear()
    fastest._orders.clear()
    assert gpu_calibration.calibrate(HOST) is not None
    assert (clock.ran, tried) == ([], ["gluon"])
    assert fastest.order_of(HOST) == (("tma",) if outcome else ("gluon", "tma"))


def test_contenders_that_cannot_take_a_call_are_not_tried(monkeypatch):
    refuses = SimpleNamespace(unfit=lambda kind: "never", why_not=lambda kind: "never")
    monkeypatch.setattr(registry, "module_of", lambda operation, name: refuses)
    monkeypatch.setattr(probe, "try_out", None)
    assert gpu_calibration.calibrate(KIND) is None


def test_constants_are_kept_for_later_processes(monkeypatch, tmp_path):
    times = {"triton": [2.0], "tma": [1.0]}
    monkeypatch.setattr(gpu_calibration, "_that_take", lambda kind: ["tma", "triton"])
    monkeypatch.setattr(gpu_calibration, "measure", lambda kind, names, ms_of: (RATES, times))
    assert gpu_calibration.rates_of(KIND) is None
    assert gpu_calibration.calibrate(KIND) == RATES
    (path,) = tmp_path.rglob("gpu_rates_*.json")
    assert json.loads(path.read_text())[1] is None
    gpu_calibration._known.clear()
    fastest._orders.clear()
    assert fastest.order_of(KIND) == ("tma", "triton")
    monkeypatch.setattr(gpu_calibration, "measure", None)
    assert gpu_calibration.rates_of(KIND) == RATES
    assert gpu_calibration.calibrate(KIND) == RATES
    monkeypatch.setattr(chip, "name", lambda device: "another GPU")
    gpu_calibration._known.clear()
    assert gpu_calibration.rates_of(KIND) is None


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("no kernel")])
def test_what_cannot_be_measured_is_told_and_assumed(error, monkeypatch, caplog):
    def fail(kind, names, ms_of):
        raise error

    monkeypatch.setattr(gpu_calibration, "_that_take", lambda kind: ["tma"])
    monkeypatch.setattr(gpu_calibration, "measure", fail)
    assert gpu_calibration.calibrate(KIND) is None
    assert f"was not measured: {error}" in caplog.text
    assert predicted(929, 24, 0.175)[0].sparse_ms > 0


def test_prediction_measures_nothing(monkeypatch):
    monkeypatch.setattr(gpu_calibration, "measure", None)
    predicted(0, 8, 0.2)


def test_compiling_measures_the_gpus_of_its_calls(monkeypatch):
    from lipass.compile import unit
    from lipass.kernels import ops  # noqa: F401

    case = make_case("decode", 2, (4, 4), 0, (1, 4, 4), dtype=torch.bfloat16)
    graph = torch.fx.Graph()
    q = graph.placeholder("q")
    given = (q, [q], [q], [2, 4, 4], [2, 4, 4], "current", [1, 4, 4], 0.3, 1.0, 0, "self", None)
    node = graph.call_function(torch.ops.lipass.sparse_attention.default, (*given, "site"))
    asked = []
    monkeypatch.setattr(unit, "calibrate", asked.append)
    for device in ("cpu", "cuda"):
        with torch._subclasses.FakeTensorMode():
            node.meta["example_value"] = torch.empty(case.q.shape, device="cpu").bfloat16()
        node.meta["example_value"].fake_device = torch.device(
            device, 0 if device == "cuda" else None
        )
        unit._measure_gpus([node])
    assert asked == [GpuKind(CUDA, torch.bfloat16, 8, 16, in_runs=False)]
    node.kwargs = {"tile_order": "current"}
    unit._measure_gpus([node])
    assert asked[1:] == [GpuKind(CUDA, torch.bfloat16, 8, 16, in_runs=True)]
