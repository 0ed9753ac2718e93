"""Identities of computing a step on half of the grid, which hold for all latents and levels."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipass.grow import cosines, fit_spectrum, larger, retimed, smaller, velocity

levels = st.floats(0.05, 1.0)


def low_band(planes):
    """Coefficients of the frequencies that half of the grid has."""
    rows, columns = planes.shape[-2:]
    found = cosines(rows).float() @ planes @ cosines(columns).float().mT
    return found[..., : rows // 2, : columns // 2]


def without_high_band(planes):
    return larger(smaller(planes))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 15])
def test_the_transform_is_orthonormal(n):
    assert torch.allclose(cosines(n) @ cosines(n).mT, torch.eye(n, dtype=torch.float64))


def test_what_is_constant_stays_and_low_frequencies_keep_their_numbers():
    assert torch.allclose(larger(torch.full((2, 4, 6), 0.7)), torch.full((2, 8, 12), 0.7))
    assert torch.allclose(smaller(torch.full((2, 8, 12), 0.7)), torch.full((2, 4, 6), 0.7))
    x = torch.randn(3, 4, 6)
    assert torch.allclose(smaller(larger(x)), x, atol=1e-5)
    assert torch.allclose(low_band(larger(x)), 2 * cosines(4).float() @ x @ cosines(6).float().mT,
                          atol=1e-5)  # fmt: skip


@given(levels)
def test_signal_and_noise_are_what_the_level_of_half_of_the_grid_says(t):
    gain, level = retimed(t)
    assert gain * (1 - t) == pytest.approx(1 - level, abs=1e-9)
    assert gain * t / 2 == pytest.approx(level)  # noise of a mean of four is half as loud
    assert level <= t


@given(levels)
def test_it_undoes_the_gain_and_level_with_which_the_paper_grows_a_grid(t):
    gain, level = retimed(t)
    kappa, back = 2 / (1 + level), 2 * level / (1 + level)
    assert back == pytest.approx(t)
    assert kappa * gain / 2 == pytest.approx(1)


@settings(deadline=None, max_examples=10)
@given(levels)
def test_low_frequencies_of_a_noisy_state_are_one_of_the_lower_level(t):
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(256, 16, 16, generator=draw)
    gain, level = retimed(t)
    found = gain * smaller((1 - t) * 0.5 + t * noise)
    assert float(found.mean()) == pytest.approx((1 - level) * 0.5, abs=0.02)
    assert float(found.std()) == pytest.approx(level, rel=0.03)


def known(clean):
    """A model that predicts these clean latents on whichever grid."""

    def call(x, level):
        there = clean if x.shape[-1] == clean.shape[-1] else smaller(clean)
        return (x - there) / level

    return call


@settings(deadline=None, max_examples=10)
@given(levels)
def test_where_clean_latents_have_no_high_frequencies_the_velocity_is_the_same(t):
    clean = without_high_band(torch.randn(1, 2, 3, 8, 12))
    x = (1 - t) * clean + t * torch.randn(1, 2, 3, 8, 12)
    call = known(clean)
    assert torch.allclose(velocity(call, x, t), call(x, t), atol=1e-4)


def test_the_next_state_has_what_is_predicted_and_the_noise_that_was_drawn():
    clean, noise = torch.randn(1, 2, 3, 8, 8), torch.randn(1, 2, 3, 8, 8)
    t, after = 0.9, 0.7
    x = (1 - t) * without_high_band(clean) + t * noise
    state = x + (after - t) * velocity(known(clean), x, t)
    expected = (1 - after) * without_high_band(clean) + after * noise
    assert torch.allclose(state, expected, atol=1e-5)


def test_euler_on_both_grids_is_what_the_paper_does_on_the_small_one_and_grows():
    torch.manual_seed(0)
    sigmas, whole = (1.0, 0.95, 0.85, 0.7), torch.randn(1, 2, 3, 8, 8)

    def call(x, level):  # any model: it sees one grid
        return torch.tanh(1.3 * x + level) + 0.1 * x.roll(1, -1)

    state = whole
    for t, after in itertools.pairwise(sigmas):
        state = state + (after - t) * velocity(call, state, t)

    small = 2 * smaller(whole)  # noise of level 1
    times = [retimed(t)[1] for t in sigmas]
    for t, after in itertools.pairwise(times):
        small = small + (after - t) * call(small, t)
    kappa, level = 2 / (1 + times[-1]), 2 * times[-1] / (1 + times[-1])
    high = whole - without_high_band(whole)  # lifted with unit noise times its level
    grown = kappa * (larger(small) / 2 + times[-1] * high)
    assert level == pytest.approx(sigmas[-1])
    assert torch.allclose(state, grown, atol=1e-5)


def test_a_velocity_that_is_kept_is_the_same_over_the_steps_that_take_it():
    """So a reused step on half of the grid is the merged one."""
    x, t, after = torch.randn(1, 2, 3, 8, 8), 0.95, 0.8
    kept = torch.randn(1, 2, 3, 4, 4)
    first = velocity(lambda x, level: kept, x, t)
    state = x + (after - t) * first
    assert torch.allclose(velocity(lambda x, level: kept, state, after), first, atol=1e-4)


def test_low_precision_and_levels_as_tensors_stay_what_they_are():
    x = torch.randn(1, 2, 3, 8, 8, dtype=torch.bfloat16)
    seen = []

    def call(x, level):
        seen.append((x.dtype, level))
        return x

    made = velocity(call, x, torch.tensor(0.9))
    assert made.dtype == seen[0][0] == torch.bfloat16
    assert isinstance(seen[0][1], torch.Tensor)


@pytest.mark.parametrize(
    ("x", "call", "error", "words"),
    [
        (torch.zeros(1, 2, 3, 15, 26), None, ValueError, "even to be halved, got 15 .* along Y"),
        (torch.zeros(1, 64, 16), None, ValueError, r"latents \[B, .., Y, X\], got .*; pack them"),
        (torch.zeros(1, 2, 3, 8, 8), lambda x, level: (x, x), TypeError, "got tuple; take it"),
        (
            torch.zeros(1, 2, 3, 10, 8),
            lambda x, level: x[..., :4, :],
            ValueError,
            r"shape of its latents, got \[1, 2, 3, 4, 4\] for \[1, 2, 3, 5, 4\]; make positions",
        ),
    ],
)
def test_what_cannot_be_halved_is_refused(x, call, error, words):
    with pytest.raises(error, match=words):
        velocity(call, x, 0.9)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.5])
def test_the_spectrum_of_latents_is_found(exponent):
    draw, shape = torch.Generator().manual_seed(0), (32, 48)
    down, across = (torch.arange(n) / 2 * 32 / n for n in shape)
    cycles = torch.hypot(down[:, None], across)
    cycles[0, 0] = 1.0
    wanted = 3.0 * cycles**-exponent
    found = wanted.sqrt() * torch.randn(64, 4, *shape, generator=draw)
    planes = cosines(32).float().mT @ found @ cosines(48).float()
    amplitude, slope = fit_spectrum(planes)
    assert slope == pytest.approx(exponent, abs=0.1)
    assert amplitude == pytest.approx(3.0, rel=0.15)


def test_a_spectrum_of_few_latents_or_of_none_is_refused():
    with pytest.raises(ValueError, match=r"at least 8 rows and columns, got shape \[2, 4, 4\]"):
        fit_spectrum(torch.randn(2, 4, 4))
    with pytest.raises(ValueError, match="got none in a ring; give latents of real scenes"):
        fit_spectrum(torch.zeros(2, 8, 8))


def test_autocast_around_the_loop_rounds_no_latents():
    x = torch.randn(2, 4, 8, 8)
    expected = smaller(x), larger(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = smaller(x), larger(x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_levels_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one a sample, got levels of shape \[3\]"):
        velocity(lambda x, level: x, torch.randn(2, 4, 1, 8, 8), torch.ones(3))


def test_power_that_rises_with_frequency_is_fitted_by_its_mean():
    rising = torch.fft.fftfreq(16).abs()[:, None] + torch.fft.fftfreq(16).abs()
    planes = torch.fft.ifft2(rising * torch.fft.fft2(torch.randn(400, 16, 16))).real
    amplitude, slope = fit_spectrum(planes)
    assert slope == 0
    assert 0.3 < amplitude / float(planes.square().mean()) < 1.5
