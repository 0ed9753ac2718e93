"""Providers are asked in the order in which they were measured, and otherwise as ever."""

import pytest
import torch

from lipass.kernels import chip, fastest, registry
from lipass.kernels.block_sparse.kind import Asking, Kind, measured
from lipass.kernels.fastest import GpuKind
from lipass.kernels.plan import BlockGrid, KvLayout

CUDA = torch.device("cuda", 0)
KIND = GpuKind(CUDA, torch.bfloat16, 128, 128)
TILES = KvLayout.build(("text", "current"), ((1, 1, 9), (4, 9, 8)), (4, 8, 4))
RUNS = KvLayout.build(("text", "current"), ((1, 1, 9), (4, 9, 8)), (4, 8, 4), ("current",))
CALL = Kind(CUDA, torch.bfloat16, 128, 128, 128, False)
TIMES = {"triton": [4.0, 1.0], "tma": [1.0, 5.0], "gluon": [1.5, 1.5]}


@pytest.fixture(autouse=True)
def _nothing_known(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(chip, "name", lambda device: "a GPU")
    monkeypatch.setattr(fastest, "_orders", {})


def asked(given=(), refuse=()):
    """List who is asked, until one takes the call."""
    names = []

    def why_not(module):
        names.append(module)
        return "refuses" if module in refuse else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "module_of", lambda operation, name: _Named(name))
        registry.find("block_sparse", CUDA, why_not, given)
    return [str(name) for name in names]


class _Named:
    def __init__(self, name):
        self.name = name

    def __eq__(self, other):
        return self.name == other

    def __hash__(self):
        return hash(self.name)

    def __str__(self):
        return self.name


def test_with_none_measured_the_order_is_that_of_the_registry():
    assert fastest.order_of(KIND) == ()
    assert measured(CALL, TILES) == ()
    assert asked(measured(CALL, TILES), refuse={"tma", "triton"}) == ["tma", "triton"]


def test_the_fastest_is_asked_first():
    """By the mean of logarithms, so that a short call counts as much as a long one."""
    assert fastest.keep_times(KIND, TIMES) == ("gluon", "triton", "tma")
    assert measured(CALL, TILES) == ("gluon", "triton", "tma")
    every = {"gluon", "tma", "triton"}
    assert asked(measured(CALL, TILES)) == ["gluon"]
    assert asked(measured(CALL, TILES), refuse=every) == ["gluon", "triton", "tma"]


def test_who_was_not_measured_comes_after_who_was():
    fastest.keep_times(KIND, {"triton": [1.0]})
    assert asked(measured(CALL, TILES), refuse={"tma", "triton"}) == ["triton", "tma"]


def test_a_measurement_holds_for_its_kind_alone():
    fastest.keep_times(KIND, TIMES)
    for other in ({"dtype": torch.float16}, {"dim": 64}, {"k_volume": 64}):
        assert measured(CALL._replace(**other), TILES) == ()
    assert measured(CALL, RUNS) == ()
    assert measured(CALL._replace(device=torch.device("cpu")), TILES) == ()
    fastest.keep_times(KIND._replace(in_runs=True), {"tma": [1.0]})
    assert measured(CALL, RUNS) == ("tma",)
    assert measured(CALL, RUNS.laid) == ("tma",)


def test_later_processes_read_the_order(monkeypatch):
    fastest.keep_times(KIND, TIMES)
    fastest._orders.clear()
    assert fastest.order_of(KIND) == ("gluon", "triton", "tma")
    fastest._orders.clear()
    monkeypatch.setattr(torch, "__version__", "another")
    assert fastest.order_of(KIND) == ()


def test_who_is_preferred_by_name_is_asked_before_the_fastest():
    with registry.prefer("block_sparse", "tma"):
        assert asked(("gluon", "tma"), refuse={"tma", "gluon"}) == ["tma", "gluon", "triton"]


def test_a_call_on_the_host_reads_no_file(monkeypatch):
    monkeypatch.setattr(fastest, "read", None)
    q = torch.zeros(1, 1, 288, 16)
    grid = BlockGrid((4, 9, 8), (4, 8, 4))
    asking = Asking(q, [q[:, :, :9], q], [q[:, :, :9], q], grid, TILES, False)
    assert asking.measured == ()
