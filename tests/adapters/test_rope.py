"""Rotary tables of a call's own tokens equal the cut of those of the whole sequence."""

import pytest
import torch

from lipass.adapters.rope import rotary_tables


def whole(dims, sizes, theta):
    """The usual way: all places of a sequence, flattened."""
    grid = torch.meshgrid(*(torch.linspace(0, n, n + 1)[:n] for n in sizes), indexing="ij")
    angles = [
        torch.outer(
            places.reshape(-1),
            1.0 / (theta ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim)),
        )
        for dim, places in zip(dims, grid, strict=True)
    ]
    return [
        torch.cat([one.repeat_interleave(2, dim=1) for one in turned], dim=1)
        for turned in ([a.cos() for a in angles], [a.sin() for a in angles])
    ]


@pytest.mark.parametrize(
    ("dims", "start", "sizes", "theta"),
    [
        ((8, 12, 12), 0, (4, 3, 5), 256),
        ((8, 12, 12), 13, (4, 3, 5), 256),
        ((2, 2, 4), 1, (1, 1, 1), 10000.0),
        ((16, 56, 56), 20, (7, 2, 3), 256.0),
    ],
)
def test_tables_are_the_cut_of_the_whole_to_the_bit(dims, start, sizes, theta):
    frames, height, width = sizes
    places = height * width
    full = whole(dims, (start + frames + 2, height, width), theta)
    own = rotary_tables(dims, start, sizes, theta, torch.device("cpu"))
    for mine, theirs in zip(own, full, strict=True):
        assert torch.equal(mine, theirs[start * places : (start + frames) * places])


def test_lengths_in_front_make_no_new_graph(fresh_dynamo):
    graphs = []

    def counting(gm, inputs):
        graphs.append(gm)
        return gm

    @torch.compile(backend=counting)
    def tables(x, start):
        return rotary_tables((2, 4, 4), start, x.shape, 100.0, x.device)[0]

    for start in (0, 4, 8, 12, 20):
        tables(torch.zeros(4, 2, 2), start)
    assert len(graphs) <= 3
