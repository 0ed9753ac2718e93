"""The gate on a GPU: what it assumes, what is measured and kept, and what slots and waves cost."""

import json

import pytest
import torch
from kernel_cases import make_case

from lipass.kernels import chip, cost, gpu_calibration
from lipass.kernels.calibration import Form, Rates
from lipass.kernels.formulas import work_of
from lipass.kernels.gpu_calibration import GpuKind
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


def test_measuring_fits_the_times_of_both_forms(monkeypatch):
    """Times are those of known constants; calls run once, on the host."""
    pytest.importorskip("triton", reason="needs Triton")
    case = gpu_calibration._Case
    monkeypatch.setattr(gpu_calibration, "_HEADS", 1)
    monkeypatch.setattr(gpu_calibration, "_SIZE", (8, 8))
    monkeypatch.setattr(gpu_calibration, "_TEXT_TOKENS", 32)
    times, ran = [], []

    class Timed(case):
        def call(self, form):
            call, (flops, moved) = super().call(form), self.work(form)
            rates = RATES.joined if form == "joined" else RATES.sparse
            times.append(rates.fixed_ms + flops / rates.flops_per_ms + moved / rates.bytes_per_ms)
            return call

    monkeypatch.setattr(gpu_calibration, "_Case", Timed)

    def ms_of(call):
        ran.append(call())
        return times[-1]

    kind = GpuKind(torch.device("cpu"), torch.float32, 16, 64)
    found = gpu_calibration.measure(kind, ms_of)
    assert len(ran) == 12
    for form, wanted in ((found.joined, RATES.joined), (found.sparse, RATES.sparse)):
        assert form == pytest.approx(wanted, rel=1e-3)


def test_constants_are_kept_for_later_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_calibration, "measure", lambda kind, ms_of: RATES)
    assert gpu_calibration.rates_of(KIND) is None
    assert gpu_calibration.calibrate(KIND) == RATES
    (path,) = tmp_path.rglob("gpu_rates_*.json")
    assert json.loads(path.read_text())[1] is None
    gpu_calibration._known.clear()
    monkeypatch.setattr(gpu_calibration, "measure", None)
    assert gpu_calibration.rates_of(KIND) == RATES
    assert gpu_calibration.calibrate(KIND) == RATES
    monkeypatch.setattr(chip, "name", lambda device: "another GPU")
    gpu_calibration._known.clear()
    assert gpu_calibration.rates_of(KIND) is None


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("no kernel")])
def test_what_cannot_be_measured_is_told_and_assumed(error, monkeypatch, caplog):
    def fail(kind, ms_of):
        raise error

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
    assert asked == [GpuKind(CUDA, torch.bfloat16, 8, 16)]
