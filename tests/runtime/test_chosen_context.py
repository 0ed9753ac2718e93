"""A graph asks how much of a view is seen; a session that has chosen answers for the kernel."""

import pytest
import torch
from mini_decode import Mini, chunk, compiled, inputs, level

import lipass
import lipass.kernels.view_overlap.api
from lipass.kernels import registry
from lipass.runtime.chosen_context import chosen_by_caller

LENS = (60.0, 35.0, 0.5, 8.0)


def cameras(*yaws_deg):
    w2c = torch.eye(4).repeat(1, len(yaws_deg), 1, 1)
    for n, yaw in enumerate(torch.tensor(yaws_deg).deg2rad()):
        w2c[0, n, 0, 0] = w2c[0, n, 2, 2] = yaw.cos()
        w2c[0, n, 0, 2], w2c[0, n, 2, 0] = yaw.sin(), -yaw.sin()
    return w2c


def test_every_view_counts_as_seen_inside_and_as_it_is_outside():
    query, memory = cameras(0.0), cameras(0.0, 180.0)
    plain = torch.ops.lipass.view_overlap(query, memory, *LENS)
    assert plain.tolist() == [[1.0, 0.0]]
    with chosen_by_caller():
        chosen = torch.ops.lipass.view_overlap(query, memory, *LENS)
    assert torch.equal(chosen, torch.ones(1, 2))
    assert torch.equal(torch.ops.lipass.view_overlap(query, memory, *LENS), plain)


def test_the_innermost_answer_holds():
    query, memory = cameras(0.0), cameras(0.0, 180.0)
    with chosen_by_caller(), registry.answer("view_overlap", lambda q, m: m.new_full((1, 2), 0.5)):
        assert torch.ops.lipass.view_overlap(query, memory, *LENS).tolist() == [[0.5, 0.5]]
    assert registry.answer_of("view_overlap") is None


def test_a_replay_reads_what_was_recorded_and_no_more_by_the_cameras_of_the_graph(fresh_dynamo):
    options = {"context.window_chunks_max": 1, "context.memory_latents": 0}
    model = compiled(Mini().eval(), preset="context", **options)
    x, w2c, text, cache = inputs(16)

    def run(session):
        with torch.no_grad(), chunk(session, w2c, 16) as made:
            return model(x, level(1.0), w2c, text, cache), made.plan

    recorded, plan = run(lipass.Session(preset="context", **options))
    assert len(plan.context.indices) < 16
    assert torch.equal(run(lipass.Session.replay([plan]))[0], recorded)


def test_a_replay_without_its_options_is_told_to_have_them(fresh_dynamo):
    options = {"preset": "all", "sparse.budget": 0.5}
    model = compiled(Mini().eval(), **options)
    x, w2c, text, cache = inputs(16)

    def run(session):
        with torch.no_grad(), chunk(session, w2c, 16):
            return model(x, level(1.0), w2c, text, cache)

    session = lipass.Session(**options)
    recorded = run(session)
    snapshot = session.snapshot()
    said = r"of the session.*; replay with those of the recording, Session\.replay\(plans, config"
    with pytest.warns(lipass.LipassWarning, match=said):
        run(lipass.Session.replay(snapshot.plans))
    assert torch.equal(run(lipass.Session.replay(snapshot)), recorded)


def test_latents_are_chosen_by_where_they_are_held_though_the_graph_has_cameras(fresh_dynamo):
    options = {"context.window_chunks_max": 1, "context.memory_latents": 0}
    model = Mini().eval()
    fast = compiled(model, preset="context", **options)
    x, w2c, text, cache = inputs(16)
    turned = [*range(8, 16), *range(8)]
    given = torch.cat([w2c[:, turned], w2c[:, 16:]], 1)

    def rows(latents):
        return (torch.tensor(latents)[:, None] * 16 + torch.arange(16)).flatten()

    session = lipass.Session(preset="context", **options)
    with torch.no_grad(), session, chunk(session, w2c, 16, held=turned) as made:
        found = fast(x, level(1.0), given, text, cache[:, :, rows(turned)])
    assert made.context == [0, 12, 13, 14, 15]
    # the first and the last places are read in any case
    read = sorted({*made.context, turned[0], *turned[-4:]})
    assert made.latents_read == len(read)
    expected = model(x, level(1.0), w2c, text, cache[:, :, rows(read)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
