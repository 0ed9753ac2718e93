"""What a world calls its words and presets is what links to walks and kept visits can hold."""

import pytest
from painted import PaintedWorld

from lipass.cli.play import load_world
from lipass.errors import LipassError
from lipass.play.host import Host
from lipass.play.vocabulary import Vocabulary


def world(**has):
    found = PaintedWorld()
    for name, value in has.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize(
    ("has", "why"),
    [
        ({"words": {"time": ("day", "golden hour")}}, "got 'golden hour'; .* 'golden-hour'"),
        ({"words": {"time": ("Day", "night")}}, "a word of a world must be .* 'Day'; .* 'day'"),
        ({"words": {"time": ("a" * 21,)}}, "must be 1 to 20 of the letters a-z"),
        ({"words": {"time": ("día",)}}, "got 'día'; use one such as 'd-a'"),
        ({"words": {"time": ("夜",)}}, "got '夜'; use one such as 'golden-hour'"),
        ({"words": {"time": ("day", "")}}, "got ''"),
        ({"words": {"time": ("day", 3)}}, "got 3"),
        ({"words": {"time": "day"}}, "words of group 'time' .* must be a list .* got 'day'"),
        ({"words": ("day", "night")}, r"must be groups by name, got \('day', 'night'\)"),
        ({"words": {"time": {"day", "night"}}}, "must be a list of one name or more"),
        ({"words": {"time": ()}}, "one name or more"),
        ({"words": {"sun": ("on", "off"), "fog": ("on", "off")}}, "in one group, once, got 'on'"),
        ({"presets": ("all", "2_steps")}, "a preset .* got '2_steps'; use one such as '2-steps'"),
        ({"presets": ()}, "presets of a world must be a list"),
        ({"look": 22.5}, "look of a world must be a whole number from 0 to 720, got 22.5"),
        ({"look": 1000}, "got 1000"),
        ({"rooms": 5}, "room of a world must be a whole number from 0 to 4, got 7"),
        ({"rooms": 0}, "rooms of a world must be a whole number from 1"),
    ],
)
def test_what_a_walk_could_not_hold_is_refused_where_a_world_is_served(has, why):
    with pytest.raises(LipassError, match=why):
        Host(world(**has))


def test_what_a_walk_could_not_hold_is_refused_where_a_world_is_loaded(tmp_path):
    target = tmp_path / "own.py"
    target.write_text(
        "from painted import PaintedWorld\n\n"
        "class Own(PaintedWorld):\n"
        "    presets = ('2_steps',)\n"
    )
    with pytest.raises(LipassError, match="got '2_steps'"):
        load_world(f"{target}:Own")


def test_names_with_digits_and_hyphens_and_worlds_without_words_are_served():
    found = world(words={"time": ("golden-hour", "4-am")}, presets=("2-steps",))
    assert Vocabulary.of(found).group_of("4-am") == "time"
    assert Vocabulary.of(world(words={})).words == {}
