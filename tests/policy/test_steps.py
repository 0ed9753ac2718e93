import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipass.config import Config
from lipass.policy.steps import StepPlan, plan_steps

SIGMAS = (1.0, 0.9375, 0.8333, 0.625, 0.0)


def options(**changed):
    return Config.resolve("all", {f"steps.{key}": value for key, value in changed.items()}).steps


def plan(total, *, allowed=True, **changed):
    return plan_steps(total, options(**changed), allowed=allowed, reason="revisits latent 3")


@pytest.mark.parametrize("total", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("form", ["merge", "lookup"])
@pytest.mark.parametrize("reuse", ["middle", (0, 1, 2, 3, 49), (1, 2), ()])
def test_first_and_last_step_always_compute(total, form, reuse):
    computed = plan(total, form=form, reuse=reuse).computed
    assert computed[0] == 0
    assert computed[-1] == total - 1


def test_middle_of_four_is_one_and_two():
    made = plan(4)
    assert made.reused == (1, 2)
    assert made.reasons == (
        "computed: first step",
        "reused: revisits latent 3",
        "reused: revisits latent 3",
        "computed: last step",
    )


def test_listed_indices_that_are_protected_or_absent_compute():
    assert plan(3, reuse=(1, 2)).reused == (1,)
    assert plan(2, reuse=(1, 2)).reused == ()
    assert plan(50, reuse=(1, 2)).reused == (1, 2)
    assert plan(50, reuse=(1, 2)).reasons[3] == "computed: not in steps.reuse"


def test_exploring_computes_everything_and_says_why():
    made = plan(4, allowed=False)
    assert made.reused == ()
    assert made.reasons[1] == "computed: revisits latent 3"


def test_policy_off_computes_everything():
    made = plan_steps(4, None, allowed=True, reason="")
    assert made.computed == (0, 1, 2, 3)
    assert made.reasons[2] == "computed: step policy is off"


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least one denoising step, got 0; pass sigmas"):
        plan(0)


def test_merge_takes_long_steps_and_lookup_all():
    merged = [(step.index, step.next_index, step.reused) for step in plan(4).sequence()]
    assert merged == [(0, 3, False), (3, 4, False)]
    looked_up = [(s.index, s.next_index, s.reused) for s in plan(4, form="lookup").sequence()]
    assert looked_up == [(0, 1, False), (1, 2, True), (2, 3, True), (3, 4, False)]


def test_plan_survives_plain_data():
    assert StepPlan.from_dict(plan(4).to_dict()) == plan(4)


def euler(x, sigmas, sequence, velocity):
    """Euler sampling; a reused step takes the velocity of the last computed one."""
    last = None
    for index, end, reused in sequence:
        if not reused:
            last = velocity(x, sigmas[index])
        x = x + (sigmas[end] - sigmas[index]) * last
    return x


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 12),
    reuse=st.one_of(st.just("middle"), st.lists(st.integers(0, 12), max_size=6).map(tuple)),
    start=st.floats(-3, 3),
    gaps=st.lists(st.floats(0.01, 1), min_size=12, max_size=12),
)
def test_euler_with_reuse_equals_euler_on_the_shorter_sigma_list(total, reuse, start, gaps):
    levels = [sum(gaps[:left]) for left in range(total, -1, -1)]

    def velocity(x, sigma):
        return 0.3 * x * x - sigma * x + 1.0 / (1.0 + sigma)

    def moves(form):
        return [
            (s.index, s.next_index, s.reused)
            for s in plan(total, form=form, reuse=reuse).sequence()
        ]

    with_reuse = euler(start, levels, moves("lookup"), velocity)
    assert euler(start, levels, moves("merge"), velocity) == pytest.approx(with_reuse, rel=1e-9)
    short = [*(levels[i] for i in plan(total, reuse=reuse).computed), levels[-1]]
    plain = [(i, i + 1, False) for i in range(len(short) - 1)]
    assert euler(start, short, plain, velocity) == pytest.approx(with_reuse, rel=1e-9)
