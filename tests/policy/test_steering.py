import itertools
import json
import math

import pytest

from lipass.policy.blend import Blend
from lipass.policy.steering import POLICIES, Steering


def test_a_change_walks_straight_and_ends_with_the_new_prompt_alone():
    assert Steering(policy="lerp").weights() == (0.25, 0.5, 0.75, 1.0)
    assert Steering(policy="hard", over_chunks=2).weights() == (1.0, 1.0)


@pytest.mark.parametrize("curve", [lambda x: x * x, [0.0625, 0.25, 0.5625, 1.0]])
def test_a_curve_is_a_function_or_a_weight_a_chunk(curve):
    assert Steering(curve=curve).weights() == (0.0625, 0.25, 0.5625, 1.0)


def test_only_history_bias_weighs_older_history_by_itself():
    weighed = {p: Steering(policy=p).history_weight for p in POLICIES}
    assert weighed.pop("history-bias") == 0.3
    assert set(weighed.values()) == {1.0}
    assert Steering(policy="lerp", alpha=0.5).history_weight == 0.5


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"policy": "lrep"}, ValueError, "'lrep'.*did you mean 'lerp'"),
        ({"over_chunks": 0}, ValueError, "over_chunks must be >= 1, got 0; use 4"),
        ({"over_chunks": 2.5}, TypeError, "over_chunks must be an int, got 2.5"),
        ({"over_chunks": True}, TypeError, "over_chunks must be an int, got True"),
        ({"alpha": 0.0}, ValueError, r"alpha must be in \(0, 1\], got 0.0; .*flush"),
        ({"alpha": math.nan}, ValueError, "alpha must be in .*got nan"),
        ({"curve": [0.5, 1.0]}, ValueError, "weight for each of over_chunks 4 chunks, got"),
        ({"curve": [0.5, 0.4, 0.8, 1.0]}, ValueError, "never fall, in chunk 2 of 4, got 0.4"),
        ({"curve": [0.5, 1.5, 1.0, 1.0]}, ValueError, r"stay in \[0, 1\].*chunk 2 of 4, got 1.5"),
        ({"curve": [-0.1, 0.4, 0.8, 1.0]}, ValueError, "in chunk 1 of 4, got -0.1"),
        ({"curve": [math.nan, 0.4, 0.8, 1.0]}, ValueError, "in chunk 1 of 4, got nan"),
        ({"curve": [0.1, 0.4, 0.8, 0.9]}, ValueError, "must end at 1, .*got 0.9"),
        ({"curve": lambda x: "all"}, TypeError, "a curve must give numbers, got 'all'"),
        ({"curve": 0.5}, TypeError, "a function or a list of numbers, got 0.5"),
        ({"curve": "1111"}, TypeError, "a function or a list of numbers, got '1111'"),
        ({"newest_latents": 0}, ValueError, "newest_latents must be >= 1"),
        ({"grow_latents": 0}, ValueError, "grow_latents must be >= 1"),
        ({"sink_latents": -1}, ValueError, "sink_latents must be >= 0"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, dict) else "",
)
def test_what_no_change_can_be_is_refused(wrong, error, said):
    with pytest.raises(error, match=said):
        Steering(**wrong)


def test_a_blend_comes_back_from_its_log():
    first = Blend("slerp", 0, 1, 0.5, 2, 4, 1.0, 12)
    blend = Blend("lerp", first, 2, 0.25, 1, 4, 0.3, 20, (16, 17), (1, 8))
    assert Blend.from_dict(json.loads(json.dumps(blend.to_dict()))) == blend
    assert blend.numbers == {0, 1, 2}


def test_memory_belongs_to_a_prompt_once_it_shows_nothing_of_the_one_before():
    first = Blend("lerp", 0, 1, 0.75)
    assert first.main == 0
    assert Blend("lerp", 0, 1, 1.0).main == 1
    assert Blend("lerp", first, 2, 0.25).main == 0


def test_changes_that_never_end_are_no_log_that_grows_without_end():
    blend = Blend("lerp", None, 0)
    for number in range(1, 200):
        blend = Blend("lerp", blend.as_old(), number, 0.25, 1, 4)
    assert len(blend.numbers) < 20


def test_changes_that_never_end_have_no_step_that_is_larger():
    """Each prompt is one more than the one before; what is shown is their mean."""

    def shown(part):
        if isinstance(part, int):
            return part
        return part.weight * part.new + (1 - part.weight) * shown(part.old)

    blend = Blend("lerp", 0, 1, 0.25, 1, 4)
    values = []
    for number in range(2, 60):
        blend = Blend("lerp", blend.as_old(), number, 0.25, 1, 4)
        values.append(shown(blend))
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert max(steps) < 1.1


def test_two_prompts_have_changed_when_the_last_chunk_begins():
    steering = Steering(policy="two-prompt", over_chunks=4)
    assert steering.weights() == pytest.approx((1 / 3, 2 / 3, 1, 1))
    assert [steering.before(place) for place in (1, 2, 3, 4)] == [
        0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), None,
    ]  # fmt: skip
    told = Steering(policy="two-prompt", over_chunks=3, curve=[0.2, 0.4, 1.0])
    assert [told.before(place) for place in (1, 2, 3)] == [0.0, 0.2, None]
    at_once = Steering(policy="two-prompt", over_chunks=1)
    assert (at_once.weights(), at_once.before(1)) == ((1.0,), None)


@pytest.mark.parametrize("policy", [one for one in POLICIES if one != "two-prompt"])
def test_other_policies_have_one_weight_a_chunk(policy):
    assert Steering(policy=policy).before(2) is None


def test_a_ramp_goes_on_by_latents_and_is_said():
    blend = Blend("two-prompt", 0, 1, 0.5, 2, 4, before=0.25)
    assert blend.ramps
    of_old, of_new = blend.logs(2)
    assert [math.exp(x) for x in of_new] == pytest.approx([0.3125, 0.4375])
    assert [math.exp(x) for x in of_old] == pytest.approx([0.6875, 0.5625])
    assert "weight 0.25 to 0.50" in blend.said()
    assert Blend.from_dict(blend.to_dict()) == blend
    still = Blend("two-prompt", 0, 1, 0.5, 2, 4, before=0.5)
    assert not still.ramps


def test_limits_hide_a_text_altogether():
    assert Blend("two-prompt", 0, 1, 1.0).logs() == ([-math.inf], [0.0])
    assert Blend("two-prompt", 0, 1, 0.0).logs() == ([0.0], [-math.inf])
