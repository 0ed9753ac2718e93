import json

import pytest
import torch
from kernel_cases import NO_NATIVE

from lipass.kernels import calibration
from lipass.kernels.calibration import Form, Rates

FORMS = [False, pytest.param(True, marks=pytest.mark.skipif(bool(NO_NATIVE), reason="no kernel"))]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration._rates.cache_clear()
    yield
    calibration._rates.cache_clear()


@pytest.mark.parametrize("compiled", FORMS)
def test_every_constant_is_positive(compiled):
    rates = calibration.measure(torch.float32, 16, compiled)
    assert (rates.apart is None) == (not compiled)
    for form in filter(None, rates):
        assert form.fixed_ms >= 0
        assert min(form[1:]) > 0


def test_dtype_that_the_compiled_kernel_does_not_know_is_measured_without_it():
    rates = calibration.cpu_rates(torch.float64, 16, torch.get_num_threads())
    assert rates.apart is None


def test_random_numbers_of_the_user_stay_theirs():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    calibration.measure(torch.float32, 16, False)
    assert torch.rand(1) == expected


def test_a_later_process_reads_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "_beaten", lambda *kind: False)
    first = calibration.cpu_rates(torch.float32, 16, 1)
    (path,) = tmp_path.rglob("rates_*.json")
    assert Rates(*(form and Form(*form) for form in json.loads(path.read_text()))) == first
    calibration._rates.cache_clear()
    monkeypatch.setattr(calibration, "measure", None)
    assert calibration.cpu_rates(torch.float32, 16, 1) == first


def test_constants_that_the_machine_beats_are_measured_again(monkeypatch, tmp_path):
    slow, fast = Form(1e6, 1.0, 1.0), Form(0.0, 1e12, 1e12)
    results = [Rates(slow, None, slow), Rates(fast, None, fast)]
    monkeypatch.setattr(calibration, "measure", lambda *kind: results.pop(0))
    monkeypatch.setattr(calibration.native, "why_not_loaded", lambda: "no compiler")
    expected = results[1]
    calibration.cpu_rates(torch.float32, 16, 1)
    calibration._rates.cache_clear()
    assert calibration.cpu_rates(torch.float32, 16, 1) == expected
    calibration._rates.cache_clear()
    assert calibration.cpu_rates(torch.float32, 16, 1) == expected


def test_constants_of_a_busy_machine_are_not_kept(monkeypatch, tmp_path, caplog):
    busy = Rates(Form(5.0, 1.0, 1.0), None, Form(0.0, 1.0, 1.0))
    monkeypatch.setattr(calibration, "measure", lambda *kind: busy)
    assert calibration.cpu_rates(torch.float32, 16, 1) == busy
    assert not list(tmp_path.rglob("rates_*.json"))
    assert "other programs use the cores" in caplog.text


@pytest.mark.parametrize("text", ["", "[1, 2", "[1]", "{}"])
def test_a_damaged_cache_is_measured_again(text, monkeypatch, tmp_path):
    expected = Rates(Form(0.0, 1.0, 1.0), None, Form(0.0, 1.0, 1.0))
    monkeypatch.setattr(calibration, "measure", lambda *kind: expected)
    calibration.cpu_rates(torch.float32, 16, 1)
    (path,) = tmp_path.rglob("rates_*.json")
    path.write_text(text)
    calibration._rates.cache_clear()
    assert calibration.cpu_rates(torch.float32, 16, 1) == expected


def test_a_cache_that_cannot_be_written_is_said_and_done_without(monkeypatch, tmp_path, caplog):
    (tmp_path / "lipass").write_text("a file, no folder")
    expected = Rates(Form(0.0, 1.0, 1.0), None, Form(0.0, 1.0, 1.0))
    monkeypatch.setattr(calibration, "measure", lambda *kind: expected)
    assert calibration.cpu_rates(torch.float32, 16, 1) == expected
    assert "could not be kept" in caplog.text


def test_line_through_exact_times():
    work = [(0.0, 0.0), (1e6, 0.0), (1e6, 1e6), (4e6, 2e6)]
    times = [0.5 + flops / 2e6 + moved / 4e6 for flops, moved in work]
    assert calibration.fit(work, times) == pytest.approx((0.5, 2e6, 4e6))


def test_what_would_count_negative_costs_nothing():
    work = [(1e6, 0.0), (2e6, 3e6), (3e6, 1e6), (4e6, 2e6)]
    times = [5.0 + flops / 1e6 - moved / 1e7 for flops, moved in work]
    found = calibration.fit(work, times)
    assert found.bytes_per_ms == float("inf")
    assert found.flops_per_ms > 0


def test_constants_of_another_source_are_not_read(monkeypatch):
    """FLOPs are counted in another file than the times are taken in; the fit depends on both."""
    kind = (torch.float32, 16, 1, False)
    before = calibration._cache_path(*kind)
    assert calibration._cache_path(*kind) == before
    monkeypatch.setattr(calibration, "kernels_hash", lambda: "another")
    assert calibration._cache_path(*kind) != before
