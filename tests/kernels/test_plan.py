"""Tiles, segments and plans against brute force over coordinates."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipass.kernels.plan import BlockGrid, BlockPlan, KvLayout, Segment

sizes = st.integers(1, 9)
tiles = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))


def blocks_by_hand(grid, tile):
    """Map each block to its tokens in slot order, with -1 outside, one coordinate at a time."""
    (size_t, size_y, size_x), (tile_t, tile_y, tile_x) = grid, tile
    rows = []
    for first in itertools.product(
        range(0, size_t, tile_t), range(0, size_y, tile_y), range(0, size_x, tile_x)
    ):
        row = []
        for step in itertools.product(range(tile_t), range(tile_y), range(tile_x)):
            t, y, x = (a + b for a, b in zip(first, step, strict=True))
            inside = t < size_t and y < size_y and x < size_x
            row.append((t * size_y + y) * size_x + x if inside else -1)
        rows.append(row)
    return rows


@given(st.tuples(sizes, sizes, sizes), tiles)
def test_token_index_is_row_major_over_blocks_and_slots(size, tile):
    grid = BlockGrid(size, tile)
    expected = blocks_by_hand(size, tile)
    assert grid.token_index().tolist() == expected
    assert grid.blocks == len(expected)
    assert grid.is_full == (-1 not in itertools.chain(*expected))
    assert grid.lengths().tolist() == [sum(token >= 0 for token in row) for row in expected]


@given(st.tuples(sizes, sizes, sizes), tiles)
def test_every_token_has_one_block_and_one_slot(size, tile):
    grid = BlockGrid(size, tile)
    owner = grid.block_of_token()
    for block, row in enumerate(grid.token_index().tolist()):
        assert all(owner[token] == block for token in row if token >= 0)
    slots = grid.token_index().flatten()[grid.slot_of_token()]
    assert torch.equal(slots, torch.arange(grid.tokens))


@pytest.mark.parametrize("size", [(20, 22, 40), (3, 30, 52), (1, 45, 80), (7, 13, 17)])
def test_production_grids_cover_every_token_once(size):
    grid = BlockGrid(size, (4, 8, 4))
    tokens = grid.token_index()[grid.valid()]
    assert torch.equal(tokens.sort().values, torch.arange(grid.tokens))


def test_neighbours_are_one_tile_away():
    grid = BlockGrid((3, 3, 3), (1, 1, 1))
    near = grid.neighbours()
    assert near[13].nonzero()[:, 0].tolist() == [4, 10, 12, 13, 14, 16, 22]
    assert near[0].sum() == 4


def test_covers_maps_each_finer_block_to_its_owner():
    coarse, fine = BlockGrid((4, 4, 4), (2, 4, 4)), BlockGrid((4, 4, 4), (1, 4, 2))
    assert coarse.covers(fine).int().tolist() == [[1] * 4 + [0] * 4, [0] * 4 + [1] * 4]


def test_covers_refuses_tiles_that_straddle():
    with pytest.raises(ValueError, match="multiple of the key tile"):
        BlockGrid((4, 4, 4), (2, 3, 4)).covers(BlockGrid((4, 4, 4), (2, 2, 4)))


def test_first_latents_are_whole_tiles():
    grid = BlockGrid((6, 2, 2), (4, 1, 2))
    assert grid.first_latents(0).tolist() == [False] * 4
    assert grid.first_latents(1).tolist() == [True] * 2 + [False] * 2
    assert grid.first_latents(5).tolist() == [True] * 4


def test_blocks_with_any_kept_frame():
    grid = BlockGrid((5, 1, 2), (2, 1, 1))
    keep = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    assert grid.blocks_with(keep).int().tolist() == [[1, 1, 0, 0, 1, 1], [0] * 6]


def test_segments_never_share_a_tile():
    layout = KvLayout.build(
        ("text", "history", "current"), ((1, 1, 5), (3, 2, 2), (1, 2, 2)), (2, 2, 2)
    )
    starts = [layout.token_range(n) for n in range(3)]
    for row in layout.token_index().tolist():
        tokens = [token for token in row if token >= 0]
        assert sum(any(token in span for token in tokens) for span in starts) == 1
    assert [list(layout.block_range(n)) for n in range(3)] == [[0], [1, 2], [3]]
    assert layout.block_of_token().tolist() == [0] * 5 + [1] * 8 + [2] * 4 + [3] * 4


def test_empty_text_has_no_block():
    layout = KvLayout.build(("text", "current"), ((1, 1, 0), (2, 2, 2)), (2, 2, 2))
    assert layout.blocks == 1
    assert layout.block_of_token().tolist() == [0] * 8


def test_dense_mask_names_visited_keys_only():
    layout = KvLayout.build(("text", "history"), ((1, 1, 1), (2, 1, 2)), (1, 1, 2))
    plan = BlockPlan(
        indices=torch.tensor([[[[0, 2], [1, -1]]]], dtype=torch.int32),
        counts=torch.tensor([[[2, 1]]], dtype=torch.int32),
        q_grid=BlockGrid((1, 1, 3), (1, 1, 2)),
        kv=layout,
        key_keep=torch.tensor([[True, True, False, True, True]]),
    )
    expected = [[1, 0, 0, 1, 1], [1, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert plan.to_dense_mask()[0, 0].int().tolist() == expected
    assert plan.density() == pytest.approx(1.5 / 3)


def test_grids_are_values():
    assert BlockGrid((1, 2, 3), (1, 1, 1)) == BlockGrid((1, 2, 3), (1, 1, 1))
    assert len({BlockGrid((1, 2, 3), (1, 1, 1)), BlockGrid((1, 2, 3), (1, 1, 1))}) == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BlockGrid((1, 2), (1, 1, 1)), r"got \(1, 2\)"),
        (lambda: BlockGrid((1, 2, -1), (1, 1, 1)), "grid must be"),
        (lambda: BlockGrid((1, 2, 3), (1, 0, 1)), "tile must be three positive"),
        (lambda: Segment("video", BlockGrid((1, 1, 1), (1, 1, 1))), "role must be one of"),
        (lambda: KvLayout.build(("text",), (), (1, 1, 1)), "needs a role and a grid"),
        (lambda: KvLayout.build(("text", "text"), ((1, 1, 1),) * 2, (1, 1, 1)), "one segment"),
        (
            lambda: KvLayout(
                (
                    Segment("text", BlockGrid((1, 1, 4), (1, 1, 4))),
                    Segment("current", BlockGrid((1, 1, 4), (1, 1, 2))),
                )
            ),
            "same tile volume",
        ),
    ],
)
def test_wrong_shapes_are_refused_with_value_and_remedy(build, message):
    with pytest.raises(ValueError, match=message):
        build()
