import dataclasses
import math
import tomllib

import pytest

from lipass.calibration.frontier import MOVABLE, Cost, Frontier, Point
from lipass.config import Config, kind_of
from lipass.errors import LipassError

RICH = Point(
    "rich", {"context.memory_latents": 6, "steps.reuse": ()}, 80.5, 1.5, 44.0, 40.0, 12.0, 4.0
)
QUICK = Point(
    "quick", {"context.memory_latents": 1, "steps.reuse": (1, 2)}, 31.0, 3.1, 34.0, 29.0, 7.0, 2.0
)
FOUND = Frontier(
    options={"preset": "all", "chunk_latents": 2, "sparse.tile": (1, 8, 8)},
    points=(RICH, QUICK),
    cost=Cost(5.0, 1.0, 4.0, 0.5),
    default="quick",
    dense_ms=96.0,
    model={"class": "World", "tensors": 3, "sha256": "ab"},
    walks=("left", "right"),
    environment={"device": "a CPU, 2 threads", "torch": "2.13.0"},
)


@pytest.fixture
def file(tmp_path):
    FOUND.save(tmp_path / "frontier.toml")
    return tmp_path / "frontier.toml"


def changed(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return file


def test_what_is_saved_is_loaded(file):
    assert Frontier.load(file) == FOUND
    assert [one.name for one in file.parent.iterdir()] == [file.name]


def test_the_file_can_be_read_by_people(file):
    text = file.read_text()
    assert text.startswith("# Written by `lipass calibrate`")
    assert '"context.memory_latents" = 6' in text
    assert tomllib.loads(text)["points"][1]["speedup"] == 3.1


def test_options_may_be_nested_as_toml_has_it(file):
    changed(file, '"context.memory_latents" = 6', "context.memory_latents = 6")
    changed(file, '"context.memory_latents" = 1', "context = { memory_latents = 1 }")
    assert Frontier.load(file) == FOUND


def test_graphs_and_sessions_take_the_default_point_from_the_file(file):
    config = Config.resolve(None, {"frontier": str(file)})
    assert config.context.memory_latents == 1
    assert config.steps.reuse == (1, 2)
    assert config.sparse.tile == (1, 8, 8)
    assert config.context.chunk_latents == 2


def test_an_option_beats_what_the_file_says(file):
    given = {"frontier": str(file), "context.memory_latents": 5, "inner": "eager"}
    config = Config.resolve(None, given)
    assert config.context.memory_latents == 5
    assert config.inner == "eager"


def test_the_path_of_a_frontier_must_be_a_string():
    with pytest.raises(TypeError, match="option 'frontier' must be a string, got 3"):
        Config.resolve(None, {"frontier": 3})


def test_all_points_make_a_config(file):
    for one in FOUND.points:
        Config.resolve(None, FOUND.options_of(one.name))


def test_movable_options_exist():
    assert all(kind_of(name) for name in MOVABLE)


def test_options_of_graphs_are_none_of_a_point(file):
    changed(file, '"context.memory_latents" = 6', '"sparse.budget_decode" = 0.3')
    with pytest.raises(ValueError, match=r"got 'sparse\.budget_decode' in 'rich'; move it to"):
        Frontier.load(file)


def test_points_are_asked_for_by_name():
    assert FOUND.point() is QUICK
    assert FOUND.point("rich") is RICH
    with pytest.raises(ValueError, match="must be one of rich, quick, got 'best'"):
        FOUND.point("best")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must be a file, got '.*none\.toml': No such file"):
        Frontier.load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schema_version = 1", "schema_version = 9", "must have schema_version 1, got 9"),
        ("schema_version = 1", "schema_version = ", "must be TOML, got"),
        ('default = "quick"', 'default = "best"', "must be one of its points, got 'best'"),
        ('name = "quick"', 'name = "rich"', "points of different names, got"),
        ("chunk_ms = 31.0", "chunk_ms = nan", "chunk_ms of a point must be finite, got nan"),
        ("chunk_ms = 31.0", 'chunk_ms = "31"', "must be complete, got TypeError: chunk_ms"),
        ("chunk_ms = 31.0", "", "must be complete, got TypeError: .*'chunk_ms'"),
        ("base_ms = 5.0", "base = 5.0", "must be complete, got TypeError"),
    ],
)
def test_files_that_were_changed_are_refused(file, old, new, said):
    with pytest.raises(ValueError, match=said):
        Frontier.load(changed(file, old, new))


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    with pytest.raises(ValueError, match="must have schema_version 1, got None"):
        Frontier.load(tmp_path / "pyproject.toml")


def test_writing_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tomli_w", None)
    with pytest.raises(LipassError, match=r"needs tomli_w, .*pip install 'lipass\[calibrate\]'"):
        FOUND.save(tmp_path / "frontier.toml")


def test_a_chunk_is_foreseen_from_what_it_reads_and_computes():
    assert FOUND.cost.ms(10, 2) == 5 + 10 + 2 * (4 + 5)
    assert math.isclose(Cost(3.0).ms(100, 4), 3.0)


def test_points_stand_where_their_times_put_them():
    added = Point("slow", {}, 120.0, 1.1, 50.0, 49.0, 20.0, 4.0)
    found = dataclasses.replace(FOUND, points=(*FOUND.points, added))
    assert [one.name for one in found.points] == ["slow", "rich", "quick"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("base_ms = 5.0", 'base_ms = "5"', "base_ms of a cost must be a number, got '5'"),
        ("base_ms = 5.0", "base_ms = nan", "base_ms of a cost must be finite, got nan"),
        ("latent_ms = 1.0", "latent_ms = -1.0", "latent_ms of a cost must be >= 0, got -1"),
        ("chunk_ms = 31.0", "chunk_ms = 0", "chunk_ms of a point must be above 0, got 0"),
        ("dense_ms = 96.0", "dense_ms = inf", "dense_ms of a frontier must be finite, got inf"),
    ],
)
def test_a_number_that_somebody_has_written_is_checked(file, old, new, said):
    with pytest.raises(ValueError, match=said):
        Frontier.load(changed(file, old, new))


def test_a_cost_of_nothing_is_none():
    with pytest.raises(ValueError, match="must have a part above 0, got none"):
        Cost(0.0)
