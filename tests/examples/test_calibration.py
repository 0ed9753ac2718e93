import re

import pytest

import lipass
from lipass.examples.tinyworld import calibration
from lipass.examples.tinyworld.compare import CALIBRATED, options_of


@pytest.fixture(scope="module")
def shipped():
    return lipass.Frontier.load(CALIBRATED)


def test_options_were_found_in_rooms_that_the_model_was_trained_on(shipped):
    rooms = {int(re.search(r"room (\d+)", walk)[1]) for walk in shipped.walks}
    assert rooms <= {*calibration.ROOMS}
    assert max(rooms) < 9000  # 9001 and 9501 and those behind them are held out


def test_the_frontier_is_of_the_model_that_ships(shipped):
    from lipass.examples.tinyworld.weights import load
    from lipass.runtime.snapshot import mark_of

    assert shipped.model == mark_of(load()[0])


def test_presets_take_what_was_found_for_their_sections(shipped):
    found = shipped.point().options
    whole = options_of("all", "eager")
    assert found.items() <= whole.items()
    assert {key for key in options_of("context", "eager") if key in found} == {
        key for key in found if key.startswith("context.")
    }
    assert not {*options_of("sparse", "eager")} & {*found}
    assert options_of("reference", "eager") == {"preset": "reference", "inner": "eager"}


def test_points_are_told_apart_by_quality_and_time(shipped):
    assert len(shipped.points) >= 3
    assert [one.chunk_ms for one in shipped.points] == sorted(
        (one.chunk_ms for one in shipped.points), reverse=True
    )
    assert shipped.point().db_worst >= min(one.db_worst for one in shipped.points)
