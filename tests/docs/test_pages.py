"""Pages that say what the code says are up to date; README is one screen and has a picture."""

import pytest
from PIL import Image

from docs.make import generated


@pytest.fixture(scope="module")
def pages():
    return generated.pages()


WRITTEN = ("options.md", "passes.md", "install.md", "models/index.md", "calibrate.md")


@pytest.mark.parametrize("path", [f"docs/{name}" for name in WRITTEN])
def test_page_is_what_the_code_says(pages, path):
    shown = (generated.ROOT / path).read_text(encoding="utf-8")
    assert shown == pages[path], "run make pages"


def test_every_pass_is_shown_with_a_graph_in_front_and_behind(pages):
    for name in generated.PASSES:
        section = pages["docs/passes.md"].partition(f"### `{name}`")[2].partition("\n### ")[0]
        assert "```text" in section, name


def test_readme_is_one_screen():
    assert len((generated.ROOT / "README.md").read_text().splitlines()) <= 120


def test_moving_picture_is_small_and_moves():
    path = generated.ROOT / "docs" / "race.gif"
    assert path.stat().st_size < 1_500_000
    with Image.open(path) as film:
        assert film.n_frames > 20
