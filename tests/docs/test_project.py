"""Files of the project agree with each other, and ask for commands that there are."""

import re
import tomllib

import pytest
from page_blocks import ROOT

from lipass import __version__, cli

TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def test_version_is_the_same_everywhere():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    first = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first[1] == __version__


def test_extras_of_the_docs_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = re.findall(r"'\.\[(\w+)\]'", (ROOT / "docs/install.md").read_text())
    assert named
    assert set(named) <= set(extras)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_ask_for_what_narrows_a_problem_down(path):
    text = path.read_text()
    if path.stem == "config":
        return
    assert "lipass doctor --json" in text
    assert "receipt" in text
    for command in re.findall(r"lipass (\w+)", text):
        assert command in cli.COMMANDS
