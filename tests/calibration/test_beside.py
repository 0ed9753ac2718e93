"""What is said beside a frontier holds in all of its points, and the rest is each point's own."""

import pytest

import lipass
from lipass.calibration.beside import beside
from lipass.calibration.frontier import Cost, Frontier, Point
from lipass.config import Config

OPTIONS = {"preset": "all", "hfov_deg": 75.0, "sparse": False}


def point(name, chunk_ms, **options):
    own = {f"context.{key}": value for key, value in options.items()} | {"steps.overlap_min": 0.0}
    return Point(name, own, chunk_ms, 1.0, chunk_ms / 2, chunk_ms / 2, 8.0, 2.0)


FOUND = Frontier(
    options=OPTIONS,
    points=(
        point("rich", 90.0, sink_latents=4, memory_chunks=3, window_chunks_max=4),
        point("quick", 30.0, sink_latents=1, memory_latents=2, window_latents=2),
    ),
    cost=Cost(5.0),
    default="quick",
    dense_ms=100.0,
)


def resolved(name=None, **options):
    return Config.resolve(None, beside(FOUND, options, name))


def test_a_point_has_nothing_of_the_default():
    context = resolved("rich").context
    assert (context.window_latents, context.window_chunks_max) == (None, 4)
    assert resolved("quick").context.window_latents == 2


@pytest.mark.parametrize("target", [{"target_chunk_ms": 100}, {"target_db": 40}])
def test_a_session_makes_chunks_at_points_as_they_were_calibrated(target):
    with lipass.Session(frontier=FOUND, **target) as session:
        plan = session.chunk(poses=None, query=None).plan
        config = session.config_of(plan)
    assert plan.point == "rich"
    assert config == Config.resolve(None, FOUND.options_of("rich"))


def test_a_window_that_is_said_is_that_of_all_points():
    for name in ("rich", "quick"):
        context = resolved(name, **{"context.window_chunks_max": 2}).context
        assert (context.window_latents, context.window_chunks_max) == (None, 2)


def test_memory_that_is_said_is_that_of_all_points():
    context = resolved("rich", **{"context.memory_latents": 5}).context
    assert (context.memory_chunks, context.memory_latents) == (None, 5)


def test_a_budget_that_is_said_in_short_is_that_of_all_points():
    found = Frontier(
        options={"preset": "all", "sparse.budget_decode": 0.2},
        points=FOUND.points, cost=FOUND.cost, default="quick", dense_ms=100.0,
    )  # fmt: skip
    config = Config.resolve(None, beside(found, {"sparse.budget": 0.5}))
    assert config.sparse.budget_decode == 0.5


@pytest.mark.parametrize("preset", ["off", "exact", "context", "cache", "sparse"])
def test_another_preset_leaves_out_what_it_has_not(preset):
    plain, config = Config.resolve(preset, {"hfov_deg": 75.0}), resolved(preset=preset)
    for section in ("context", "sparse", "steps"):
        assert (getattr(config, section) is None) == (getattr(plain, section) is None)
    if config.context is not None:
        assert config.context.window_latents == 2


def test_a_preset_of_another_policy_has_its_own_options():
    config = resolved(preset="reference")
    assert config == Config.resolve("reference", {"hfov_deg": 75.0})


def test_a_section_that_is_switched_off_is_left_out():
    config = resolved(steps=False)
    assert config.steps is None
    assert config.context.window_latents == 2


def test_attention_that_was_found_to_be_dense_stays_so():
    assert resolved().sparse is None
    assert resolved(preset="all").sparse is None
    assert resolved(sparse=True).sparse is not None


def test_graphs_and_sessions_read_a_file_alike(tmp_path):
    FOUND.save(tmp_path / "frontier.toml")
    options = {"frontier": str(tmp_path / "frontier.toml"), "preset": "context"}
    with lipass.Session(**options) as session:
        assert session.config == Config.resolve(None, options)
    assert Config.resolve("context", {"frontier": options["frontier"]}) == session.config


def test_a_config_beside_a_frontier_is_refused():
    with pytest.raises(TypeError, match="a session takes a config or a frontier, got both"):
        lipass.Session(Config.resolve("off"), frontier=FOUND)
