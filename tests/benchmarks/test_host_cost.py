"""What a sparse call costs the host on a GPU, by what it does: times depend on the machine."""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from benchmarks import host_cost


def calls_of(run):
    """Count the functions that one call enters, Python's and those of its extensions."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(("known_means", "launches"), [(True, 3), (False, 4)])
def test_host_does_little_for_a_call_whose_like_it_has_seen(known_means, launches):
    with host_cost.launches_of_nothing() as made, torch.inference_mode():
        run = host_cost.call(known_means)
        run()
        before = sum(kernel.count for kernel in made.values())
        # 196 and 204 when this was written, 400 before descriptors and checks were kept.
        assert calls_of(run) <= 240
        assert sum(kernel.count for kernel in made.values()) - before == launches
        assert host_cost.median_us(run, calls=20) > 0
