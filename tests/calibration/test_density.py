import pytest

from lipass.calibration.density import Density, chosen, is_told, measured, ways
from lipass.config import Config

SHARED = {"preset": "all", "hfov_deg": 90.0, "sparse.tile": (1, 8, 8)}


def way(label, visited, speedup, db):
    return Density(label, {}, visited, speedup, db)


DENSE = way("dense attention", 1.0, 1.0, 42.0)


def test_all_ways_are_options_of_graphs():
    found = ways(SHARED, 0.3)
    assert list(found) == ["dense attention", "budget 0.45", "budget 0.3", "budget 0.15"]
    assert Config.resolve(None, found["dense attention"]).sparse is None
    assert Config.resolve(None, found["budget 0.15"]).sparse.budget_decode == 0.15
    assert Config.resolve(None, found["budget 0.15"]).sparse.tile == (1, 8, 8)


@pytest.mark.parametrize(
    ("found", "label"),
    [
        ([way("b", 0.5, 1.3, 41.5), way("c", 0.3, 1.6, 41.2)], "c"),
        ([way("b", 0.5, 1.3, 41.5), way("c", 0.3, 1.6, 38.0)], "b"),
        ([way("b", 0.5, 1.3, 30.0), way("c", 0.3, 1.6, 28.0)], "dense attention"),
        ([way("b", 0.5, 1.03, 42.0), way("c", 0.3, 0.9, 42.0)], "dense attention"),
        ([way("b", 1.0, 1.2, 42.0)], "dense attention"),  # faster by luck: nothing is left out
    ],
)
def test_what_pays_is_taken(found, label):
    assert chosen([DENSE, *found]).label == label


def test_who_has_decided_is_not_asked():
    assert not is_told(SHARED)
    assert is_told({**SHARED, "sparse.budget": 0.2})
    assert is_told({"preset": "all", "sparse": False})


def test_ways_are_timed_in_turn_and_the_round_that_compiles_is_left_out():
    asked = []

    def attempt(label, walk):
        asked.append((label, walk))
        slow = 100.0 if len(asked) <= 4 else 1.0
        return (20.0 if label == "a" else 10.0) * slow, 40.0, 0.5

    found = measured({"a": {}, "b": {}}, ["x", "y"], attempt)
    assert asked[:4] == [("a", "x"), ("b", "x"), ("a", "y"), ("b", "y")]
    assert [one.speedup for one in found] == [1.0, 2.0]
