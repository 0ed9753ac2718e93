"""A step is on half of the grid only where the noise at its end covers what that grid lacks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipass.config import Config
from lipass.policy.growth import band_power, grown, switch_level, whole
from lipass.policy.steps import StepPlan, plan_steps

SIGMAS = (1.0, 0.9375, 0.8333, 0.625, 0.0)
WAN = (219.484718, 2.422687)
powers = st.floats(1e-3, 1e3)
lists = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12, unique=True)


def options(**told):
    given = {f"grow.{name}": value for name, value in told.items()}
    return Config.resolve("off", {"grow": True, **given}).grow


def by_delta(delta, spectrum=WAN, grid=(60, 104)):
    return options(delta=delta, spectrum=spectrum, grid=grid)


def plan(total=4, *, form="merge", reuse=()):
    told = {"steps.form": form, "steps.reuse": reuse}
    return plan_steps(total, Config.resolve("all", told).steps, allowed=True, reason="seen again")


@given(powers, st.floats(1e-6, 0.5))
def test_at_the_switch_a_band_holds_as_much_signal_as_is_tolerated(power, part):
    delta = part * power  # more signal than there is is never missing
    t = switch_level(power, delta)
    s = ((1 - t) / t) ** 2 * power
    assert (1 + power) * s / (1 + s) == pytest.approx(delta, rel=1e-6)


def test_switches_are_those_of_the_paper():
    # Wan 2.1, 480 and 720 lines
    for shorter, expected in ((60, (0.864, 0.737)), (90, (0.782, 0.612))):
        power = band_power(WAN, shorter)
        found = [switch_level(power, delta) for delta in (0.01, 0.05)]
        assert found == pytest.approx(expected, abs=1e-3)


@given(powers)
def test_a_tolerance_above_all_signal_and_noise_never_switches(power):
    assert switch_level(power, 1 + power) == 0.0


@given(powers, lists)
def test_without_tolerance_no_step_is_on_half_of_the_grid(power, found):
    sigmas = [*sorted(found, reverse=True), 0.0]
    assert switch_level(power, 0.0) == 1.0
    made = grown(plan(len(sigmas) - 1), options(), sigmas)
    assert made.coarse == ()
    assert made.reasons == plan(len(sigmas) - 1).reasons


@given(lists)
def test_more_tolerance_is_more_steps_and_never_the_last(found):
    sigmas = [*sorted(found, reverse=True), 0.0]
    total = len(sigmas) - 1
    counts = []
    for delta in (0.001, 0.01, 0.1, 0.5, 0.99):
        coarse = grown(plan(total), by_delta(delta), sigmas).coarse
        assert coarse == tuple(range(len(coarse)))
        assert total - 1 not in coarse
        counts.append(len(coarse))
    assert counts == sorted(counts)


def test_a_step_that_ends_below_the_switch_is_on_the_whole_grid_and_says_so():
    made = grown(plan(), by_delta(0.01), SIGMAS)  # 0.864
    assert made.coarse == (0,)
    assert made.reasons[0] == "computed: first step; on half of the grid"
    assert made.reasons[1].endswith("; on the whole grid, it ends at level 0.833 < 0.864")
    assert made.reasons[3].endswith("; on the whole grid, as the last that computes")


def test_a_number_of_steps_needs_no_spectrum():
    assert grown(plan(), options(steps=2), SIGMAS).coarse == (0, 1)
    assert grown(plan(), options(steps=9), SIGMAS).coarse == (0, 1, 2)
    assert grown(plan(1), options(steps=9), (1.0, 0.0)).coarse == ()


def test_a_step_that_reaches_over_reused_ones_ends_where_they_do():
    merged = grown(plan(reuse=(1,)), by_delta(0.02), SIGMAS)  # 0.817
    assert merged.coarse == (0,)  # it ends at 0.833
    assert [step.coarse for step in merged.sequence()] == [True, False, False]
    looked_up = grown(plan(form="lookup", reuse=(1,)), by_delta(0.02), SIGMAS)
    assert looked_up.coarse == (0, 1)
    assert [step.reused for step in looked_up.sequence() if step.coarse] == [False, True]
    assert grown(plan(reuse=(1, 2)), by_delta(0.02), SIGMAS).coarse == ()  # at 0.625


def test_levels_of_other_models_are_refused():
    words = r"levels of flow matching, in 0..1, got 14.6; pass sigmas of that form"
    with pytest.raises(ValueError, match=words):
        grown(plan(2), options(steps=1), (14.6, 1.0, 0.0))


def test_whole_says_why():
    made = whole(plan(2), "as it is tried")
    assert made.coarse == ()
    assert made.reasons[0] == "computed: first step; on the whole grid, as it is tried"


def test_a_plan_is_read_back_and_an_older_one_has_not_decided():
    made = grown(plan(), options(steps=2), SIGMAS)
    assert StepPlan.from_dict(made.to_dict()) == made
    assert "coarse" not in plan().to_dict()
    assert StepPlan.from_dict(plan().to_dict()).coarse is None


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"grow.delta": 1.0}, r"grow.delta must be in \[0, 1\), got 1.0; use 0.01"),
        ({"grow.steps": -1}, "grow.steps must be >= 0, got -1; use 0"),
        ({"grow.delta": 0.01, "grow.steps": 1}, r"not both be given, got \(0.01, 1\); leave one"),
        ({"grow.delta": 0.01, "grow.grid": (8, 8)}, "needs grow.spectrum, got .*docs/grow.md"),
        ({"grow.delta": 0.01, "grow.spectrum": WAN}, "needs grow.grid, got grow.delta 0.01"),
        ({"grow.spectrum": (0, 2.0)}, r"an amplitude > 0 .* got \(0.0, 2.0\); fit it"),
        ({"grow.grid": (15, 26)}, r"two even numbers of latents .* got \(15, 26\); pad the grid"),
    ],
)
def test_what_cannot_be_is_refused(told, words):
    with pytest.raises(ValueError, match=words):
        Config.resolve("off", {"grow": True, **told})


@pytest.mark.parametrize("value", [0.5, (1.0,), (1.0, "2"), (1.0, True), (1.0, float("nan"))])
def test_a_spectrum_is_two_numbers(value):
    with pytest.raises(TypeError, match=r"'grow.spectrum' must be None or two numbers"):
        Config.resolve("off", {"grow": True, "grow.spectrum": value})
