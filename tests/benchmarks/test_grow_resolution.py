"""Identities of growing a grid within a chunk, which hold for all latents and levels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.grow_resolution import (
    SIGMAS,
    cosines,
    larger,
    lifted,
    retimed,
    small_steps,
    switch_time,
)

levels = st.floats(0.01, 1.0)
powers = st.floats(1e-3, 1e3)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 15])
def test_the_transform_is_orthonormal(n):
    assert torch.allclose(cosines(n) @ cosines(n).mT, torch.eye(n), atol=1e-6)


def test_what_is_constant_stays_and_low_frequencies_keep_their_numbers():
    assert torch.allclose(larger(torch.full((2, 4, 4), 0.7)), torch.full((2, 8, 8), 0.7))
    x = torch.randn(3, 4, 6)
    before = cosines(4) @ x @ cosines(6).mT
    after = cosines(8) @ lifted(x) @ cosines(12).mT
    assert torch.allclose(after[:, :4, :6], before, atol=1e-5)
    assert after[:, 4:].abs().max() < 1e-5
    assert torch.isclose(lifted(x).norm(), x.norm())


@given(levels, st.sampled_from([2, 3, 4]))
def test_signal_and_noise_are_again_what_the_level_says(t, ratio):
    gain, level = retimed(t, ratio)
    assert gain * (1 - t) / ratio == pytest.approx(1 - level, abs=1e-9)
    assert gain * t == pytest.approx(level)
    assert level >= t  # time goes back: part of the denoising is done again


@settings(deadline=None, max_examples=10)
@given(levels)
def test_a_noisy_state_is_lifted_to_one_of_its_new_level(t):
    draw = torch.Generator().manual_seed(0)
    clean, noise = torch.full((64, 8, 8), 0.5), torch.randn(64, 8, 8, generator=draw)
    high = t * torch.randn(64, 16, 16, generator=draw)
    gain, level = retimed(t)
    found = gain * lifted((1 - t) * clean + t * noise, high)
    assert float(found.mean()) == pytest.approx((1 - level) * 0.5, abs=0.03)
    assert float(found.std()) == pytest.approx(level, rel=0.05)


@given(powers, st.floats(1e-6, 0.5))
def test_below_the_switch_a_band_holds_less_than_the_tolerance(power, part):
    delta = part * power  # more signal than there is is never missing
    t = switch_time(power, delta)
    s = ((1 - t) / t) ** 2 * power
    assert (1 + power) * s / (1 + s) == pytest.approx(delta, rel=1e-6)


def test_switches_are_those_of_the_paper():
    # Wan 2.1, 480 and 720 lines: 0.3105 and 0.1163 at half the grid
    for power, expected in ((0.3105, (0.864, 0.737)), (0.1163, (0.782, 0.612))):
        found = [switch_time(power, delta) for delta in (0.01, 0.05)]
        assert found == pytest.approx(expected, abs=1e-3)


@given(powers)
def test_without_tolerance_no_step_is_small(power):
    assert switch_time(power, 0.0) == 1.0
    assert small_steps(SIGMAS, switch_time(power, 0.0)) == 0


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8, unique=True))
def test_the_last_step_sees_the_whole_grid(found):
    sigmas = [*sorted(found, reverse=True), 0.0]
    counts = [small_steps(sigmas, switch) for switch in (1.0, 0.9, 0.5, 0.1, 0.0)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] <= len(found) - 1
