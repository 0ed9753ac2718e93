"""Every option is listed with what it means, so that none has to be looked up in the source."""

import json

import pytest

from lipass.cli import INTERRUPTED, NOTHING_MATCHED, OK, main
from lipass.cli import doctor as some_command
from lipass.cli.options import known_options
from lipass.config import SECTIONS, Config


def test_every_option_of_a_config_is_listed_with_a_meaning():
    listed = {one["name"]: one for one in known_options()}
    for name in Config.resolve("all").to_options():
        assert name in listed or name in SECTIONS
    assert all(len(one["meaning"]) > 10 for one in listed.values())


@pytest.mark.parametrize("one", known_options(), ids=lambda one: one["name"])
def test_default_that_is_listed_is_that_of_preset_all(one):
    if one["default"] is not None:
        assert Config.resolve("all").to_options()[one["name"]] == one["default"]


def test_text_narrows_the_list(capsys):
    assert main(["options", "budget_self"]) == OK
    said = capsys.readouterr().out
    assert "sparse.budget_self  0.3; reference: 0.2" in said
    assert "context.mode" not in said


def test_json_is_one_document(capsys):
    assert main(["options", "--json"]) == OK
    assert {"name", "default", "meaning", "others"} == set(json.loads(capsys.readouterr().out)[0])


def test_nothing_of_that_name(capsys):
    assert main(["options", "nonsense"]) == NOTHING_MATCHED
    assert capsys.readouterr().out == "none has 'nonsense'\n"


def test_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(some_command, "run", interrupted)
    assert main(["doctor"]) == INTERRUPTED == 130
    assert "interrupted" in capsys.readouterr().err
