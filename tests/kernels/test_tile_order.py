"""Tokens that lie tile by tile: blocks are runs of them, and nothing else changes."""

import math

import pytest
import torch
from kernel_cases import make_case, masked_dense

import lipass.kernels.ops  # noqa: F401  (registers the operator)
from lipass.kernels import registry
from lipass.kernels.block_sparse.api import block_sparse_attention
from lipass.kernels.plan import BlockGrid
from lipass.kernels.tile_order import place_of_token, token_at_place

GRIDS = [
    ((3, 4, 6), (1, 2, 2)),
    ((4, 4, 6), (2, 2, 2)),
    ((3, 5, 7), (2, 2, 4)),
    ((1, 3, 3), (1, 2, 2)),
]


@pytest.mark.parametrize(("grid", "tile"), GRIDS)
def test_order_goes_tile_by_tile_and_back(grid, tile):
    slots = BlockGrid(grid, tile).token_index().flatten()
    order = token_at_place(grid, tile)
    assert torch.equal(order, slots[slots >= 0])
    assert torch.equal(order[place_of_token(grid, tile)], torch.arange(math.prod(grid)))


@pytest.mark.parametrize(("grid", "tile"), GRIDS)
def test_operator_gives_the_index_and_the_way_back(grid, tile):
    call = torch.ops.lipass.tile_order
    cpu = torch.device("cpu")
    assert torch.equal(call(grid, tile, False, cpu), token_at_place(grid, tile))
    assert torch.equal(call(grid, tile, True, cpu), place_of_token(grid, tile))
    call(grid, tile, False, cpu).zero_()  # what it gives is not what it keeps
    assert torch.equal(call(grid, tile, False, cpu), token_at_place(grid, tile))


def both(grid, tile):
    return BlockGrid(grid, tile), BlockGrid(grid, tile, in_order=True)


@pytest.mark.parametrize(("grid", "tile"), GRIDS[:2])
def test_runs_are_tiles_where_these_divide_the_grid(grid, tile):
    tiles, runs = both(grid, tile)
    order = token_at_place(grid, tile)
    assert torch.equal(order[runs.token_index()], tiles.token_index())
    assert torch.equal(runs.neighbours(), tiles.neighbours())
    for n in range(grid[0] + 1):
        assert torch.equal(runs.first_latents(n), tiles.first_latents(n))
    keep = torch.rand(5, grid[0]) < 0.4
    assert torch.equal(runs.blocks_with(keep), tiles.blocks_with(keep))
    assert torch.equal(runs.over_tokens(keep), tiles.over_tokens(keep)[:, order])


def test_runs_go_on_in_the_next_tile():
    tiles, runs = both((3, 5, 7), (2, 2, 4))
    assert tiles.blocks * tiles.block_tokens > 1.8 * tiles.tokens
    assert runs.blocks == math.ceil(105 / 16)
    assert torch.equal(runs.token_index().flatten()[:105], torch.arange(105))
    assert runs.neighbours().diagonal().all()
    assert runs.first_latents(1).tolist() == [True] * 5 + [False] * 2


def call_of(case, grid, tile, order, **changes):
    """Call the operator on a case, with the segments of an order put in it first."""
    q, keys, values = case.q, list(case.keys), list(case.values)
    segments = case.layout.segments
    for n, part in enumerate(segments):
        if part.role in order:
            at = token_at_place(part.grid.grid, tile)
            keys[n], values[n] = keys[n][:, :, at], values[n][:, :, at]
    if order:
        q = q[:, :, token_at_place(grid, tile)]
    options = {k: v for k, v in case.options.items() if k != "role"} | changes
    with registry.force("sparse"):
        out = torch.ops.lipass.sparse_attention(
            q, keys, values, list(grid), [n for part in segments for n in part.grid.grid],
            ",".join(part.role for part in segments), list(tile), options["budget"],
            options["scale"], options["sink_latents"], case.options["role"],
            options["keep_frames"], "ordered", tile_order=",".join(order),
        )  # fmt: skip
    return out[:, :, place_of_token(grid, tile)] if order else out


def kept(frames, *dropped):
    keep = torch.ones(1, frames, dtype=torch.bool)
    keep[:, list(dropped)] = False
    return keep


@pytest.mark.parametrize("order", [("current",), ("history", "current")])
@pytest.mark.parametrize("tile", [(1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("keep", [None, kept(4, 1)])
def test_decode_is_the_same_in_either_order(order, tile, keep):
    case = make_case("decode", 4, (4, 6), 5, tile, budget=0.3, keep_frames=keep)
    expected = call_of(case, (2, 4, 6), tile, ())
    actual = call_of(case, (2, 4, 6), tile, order)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [(1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("keep", [None, kept(4, 1, 2)])
def test_prefill_is_the_same_in_either_order(tile, keep):
    case = make_case("prefill", 4, (4, 6), 5, tile, budget=0.3, keep_frames=keep)
    expected = call_of(case, (4, 4, 6), tile, ())
    actual = call_of(case, (4, 4, 6), tile, ("current",))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_runs_over_borders_are_dense_attention_where_all_are_visited(role):
    case = make_case(role, 3, (5, 7), 5, (2, 2, 4), budget=0.9999, new_frames=3)
    order = ("history", "current")[role == "prefill" :]
    actual = call_of(case, (3, 5, 7), (2, 2, 4), order)
    k, v = torch.cat(case.keys, 2), torch.cat(case.values, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(case.q, k, v)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_counts_are_of_runs():
    registry.reset_telemetry()
    case = make_case("prefill", 3, (5, 7), 0, (2, 2, 4), budget=0.5)
    call_of(case, (3, 5, 7), (2, 2, 4), ("current",))
    (counts,) = registry.telemetry().values()
    assert counts.total_blocks == 2 * 7 * (7 + 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": ("text",)}, "tile_order names segments of latents"),
        ({"tile": [1, 2, 2, 1, 4, 2]}, "tile_order needs one tile for queries and keys"),
    ],
)
def test_orders_that_cannot_be_are_refused(changes, message):
    x = torch.zeros(1, 1, 24, 8)
    with pytest.raises(ValueError, match=message):
        torch.ops.lipass.sparse_attention(
            x, [x], [x], [1, 4, 6], [1, 4, 6], "current", changes.get("tile", [1, 2, 2]), 0.5, 1.0,
            0, "self", None, "", tile_order=",".join(changes.get("order", ("current",))),
        )  # fmt: skip


def test_plans_of_runs_say_how_tokens_lie():
    case = make_case("decode", 2, (4, 6), 0, (2, 2, 2))
    grid = case.q_grid
    ordered = BlockGrid(grid.grid, grid.tile, in_order=True)
    layout = case.layout.replace_grid(2, ordered)
    case.layout, case.q_grid = layout, ordered
    plan = case.plan()
    assert plan.q_grid.grid == (1, 1, 48)
    out = block_sparse_attention(case.q, case.keys, case.values, plan, provider="reference")
    expected, _ = masked_dense(case, plan)
    torch.testing.assert_close(out, expected.to(out.dtype), atol=1e-5, rtol=1e-5)
