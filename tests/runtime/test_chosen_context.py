"""A graph asks how much of a view is seen; a session that has chosen answers for the kernel."""

import torch

import lipass.kernels.view_overlap.api  # noqa: F401
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
