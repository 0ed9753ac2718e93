"""What is counted and not yet read: bounded, exact, and shared by threads."""

import threading

import pytest
import torch

from lipass.kernels import registry


@pytest.fixture(autouse=True)
def _fresh_counts():
    registry.reset_telemetry()
    yield
    registry.reset_telemetry()


def record(site="site", visited=3, mass=None):
    registry.record_call(
        site, role="decode", provider="native", visited=torch.tensor(visited), total=10, mass=mass
    )


def test_sums_that_nobody_reads_are_few():
    for n in range(1000):
        record(mass=torch.tensor(0.5 if n % 2 else torch.nan))
    (counts,) = registry.counted()
    assert len(counts.pending) < 300
    assert len(counts.pending_mass) < 300
    found = registry.telemetry()["site"]
    assert (found.visited_blocks, found.mass_samples, found.mass) == (3000, 500, 0.5)
    assert not found.pending
    assert not found.pending_mass


def test_making_one_of_many_reads_nothing(monkeypatch):
    for name in ("__int__", "__float__", "__bool__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, None)
    visited, mass = torch.tensor(3), torch.tensor(0.5)
    for _ in range(600):
        registry.record_call(
            "site", role="decode", provider="native", visited=visited, total=10, mass=mass
        )


def test_sums_are_kept_apart_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(registry, "capturing", lambda: True)
    for _ in range(300):
        record()
    (counts,) = registry.counted()
    assert len(counts.pending) == 300


def test_nothing_is_lost_or_counted_twice_while_threads_record():
    done = threading.Event()

    def serve(thread):
        for n in range(400):
            record("shared")
            record(f"{thread}.{n % 40}")

    def read():
        while not done.is_set():
            registry.telemetry()

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(3)]
    reader = threading.Thread(target=read)
    for thread in (reader, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    found = registry.telemetry()
    assert found["shared"].visited_blocks == 3 * 400 * 3
    assert sum(counts.visited_blocks for counts in found.values()) == 2 * 3 * 400 * 3
