"""Which noise level a call is for."""

import pytest
import torch

from lipass.runtime.levels import forms_of, other_level


def seen(before, now, *levels):
    named = [(*one, torch.equal(*map(torch.as_tensor, one[1:]))) for one in levels]
    return other_level(forms_of(*before), forms_of(*now), named)


@pytest.mark.parametrize("other", [0.0, 0.8, 0.1])
def test_level_of_another_step(other):
    moved = torch.tensor([0.8]), torch.tensor([other])
    assert seen((0.8,), (0.5,), ("t", *moved)) == "its noise level 't' is not that of the step"


def test_timestep_of_a_scheduler_without_sigmas():
    assert seen((None, 981), (None, 961), ("t", 981, 961)) is None
    assert seen((None, 981), (None, 961), ("t", 981, 0)) is not None


def test_level_that_has_no_known_form_tells_nothing():
    assert seen((0.8,), (0.5,), ("t", 0.9, 0.7)) is None
    assert seen((0.8,), (0.5,), ("t", torch.ones(1 << 13), torch.ones(1 << 13))) is None


def test_number_that_stays_tells_nothing_beside_a_level_that_moves():
    rate, level = ("rate", 1.0, 1.0), ("t", 1000, 750)
    assert seen((1.0,), (0.75,), rate, level) is None
    assert seen((1.0,), (0.75,), rate, ("t", 1000, 0)) == (
        "its noise level 't' is not that of the step"
    )


def test_number_that_changes_beside_a_level_conditions_the_call():
    level = ("t", 1000, 750)
    reason = "its input 'guidance' is another than in the step that computed"
    assert seen((1.0,), (0.75,), ("guidance", 3.0, 7.0), level) == reason
    assert seen((1.0,), (0.75,), ("guidance", 3.0, 3.0), level) is None


def test_two_numbers_that_change_and_have_no_known_form():
    assert seen((0.8,), (0.5,), ("t", 0.91, 0.71), ("action", 3, 4)) is not None
    assert seen((0.8,), (0.5,), ("t", 0.91, 0.71), ("rate", 0.8, 0.8)) is None


def test_level_a_token_moves_where_it_was_the_level_of_the_step():
    before, now = torch.tensor([0.0, 0.8, 0.8]), torch.tensor([0.0, 0.5, 0.5])
    assert seen((0.8,), (0.5,), ("t", before, now)) is None
    assert seen((0.8,), (0.5,), ("t", before, torch.zeros(3))) is not None
