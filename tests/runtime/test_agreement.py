"""Options that one side was given and the other side alone reads."""

import pytest

from lipass.config import Config
from lipass.errors import LipassWarning
from lipass.runtime.agreement import differences, tell

EVERY = {"context", "sparse", "steps"}


def between(graph, session, able=None):
    compiled, opened = Config.resolve(None, graph), Config.resolve(None, session)
    sections = {name for name in EVERY if getattr(compiled, name)} if able is None else able
    return differences(compiled, sections, opened)


@pytest.mark.parametrize(
    ("graph", "session"),
    [
        ({"preset": "all"}, {"preset": "all"}),
        ({"preset": "all", "inner": "eager"}, {"preset": "all"}),
        ({"preset": "all"}, {"preset": "cache", "steps.overlap_min": 0.0}),
        ({"preset": "all"}, {"preset": "context", "context.window_chunks_max": 1}),
        ({"preset": "exact"}, {"preset": "cache"}),
        ({"preset": "exact"}, {"preset": "context"}),
        ({"preset": "all", "sparse.tile": (4, 8, 4)}, {"preset": "all"}),
        ({"preset": "all", "sparse.budget": 0.5}, {"preset": "sparse", "sparse.dense_chunks": 2}),
        ({"preset": "all", "hfov_deg": 90}, {"preset": "all", "hfov_deg": 90}),
        ({"preset": "context", "context.overlap_min": 0.1}, {"preset": "sparse", "sparse": False}),
    ],
)
def test_what_each_side_reads_may_be_given_there_alone(graph, session):
    assert between(graph, session) == []


@pytest.mark.parametrize(
    ("graph", "session", "line"),
    [
        (
            {"preset": "all", "steps.overlap_min": 0.0},
            {"preset": "all"},
            "steps.overlap_min: 0.0 in the graph, 0.8 in the session",
        ),
        (
            {"preset": "all", "steps.form": "lookup"},
            {"preset": "sparse"},
            "steps.form: lookup in the graph, off in the session",
        ),
        (
            {"preset": "all"},
            {"preset": "all", "sparse.budget_decode": 0.1},
            "sparse.budget_decode: 0.1 in the session, 0.3 in the graph",
        ),
        (
            {"preset": "all", "sparse.dense_chunks": 3},
            {"preset": "all"},
            "sparse.dense_chunks: 3 in the graph, 0 in the session",
        ),
        (
            {"preset": "context"},
            {"preset": "all"},
            "sparse: on in the session, not in the graph",
        ),
        (
            {"preset": "exact"},
            {"preset": "cache", "steps.form": "lookup"},
            "steps: the session looks them up, the graph cannot answer",
        ),
        (
            {"preset": "context", "hfov_deg": 90},
            {"preset": "cache", "hfov_deg": 75},
            "hfov_deg: 90.0 in the graph, 75.0 in the session",
        ),
        (
            {"preset": "all"},
            {"preset": "reference"},
            "sparse.tile: (4, 8, 4) in the session, (4, 4, 4) in the graph",
        ),
    ],
)
def test_what_is_given_where_nobody_reads_it_is_listed(graph, session, line):
    assert line in between(graph, session)


def test_passes_of_a_pipeline_say_what_a_graph_can():
    graph = {"preset": "all", "pipeline": "canonicalize,find-attention"}
    assert "sparse: on in the session, not in the graph" in between(
        graph, {"preset": "sparse"}, able=set()
    )


def test_fingerprint_holds_what_both_sides_must_agree_on():
    one = Config.resolve("all")
    assert one.fingerprint() == Config.resolve("all", {"inner": "eager"}).fingerprint()
    assert one.fingerprint() != Config.resolve("all", {"sparse.budget": 0.5}).fingerprint()
    assert one.fingerprint() == Config.resolve(None, one.to_options()).fingerprint()
    assert len(one.fingerprint()) == 12


@pytest.mark.parametrize("preset", ["off", "exact"])
def test_exact_session_over_a_graph_with_sparse_attention_is_told(preset):
    (line,) = between({"preset": "all"}, {"preset": preset})
    assert f"the {preset!r} of the session" in line
    assert between({"preset": "all", "sparse": False}, {"preset": preset}) == []


def test_warnings_point_at_the_line_of_the_user():
    def of_the_library():
        tell("a rule, got a value; a remedy", strict=False)

    with pytest.warns(LipassWarning) as told:
        of_the_library()
    assert told[0].filename == __file__
