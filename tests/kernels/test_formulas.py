import pytest

from lipass.kernels.formulas import Sizes, expressions, work_of
from lipass.kernels.plan import BlockGrid, KvLayout

ROLES, GRIDS = ("text", "history", "current"), ((1, 1, 32), (20, 8, 8), (4, 8, 8))
ROWS, NUMBER_BYTES = 3 * 64, 4
TOKENS = 32 + 20 * 64 + 4 * 64


def work(form, tile=(4, 4, 4), q_tile=None, visited_blocks=10, compiled=True):
    layout = KvLayout.build(ROLES, GRIDS, tile)
    q_grid = BlockGrid(GRIDS[-1], q_tile or tile)
    return work_of(ROWS, NUMBER_BYTES, layout, q_grid, form, visited_blocks, compiled)


def test_joined_keys_are_copied_and_all_visited():
    flops, moved = work("joined")
    assert flops == 4 * ROWS * 256 * TOKENS
    assert moved == 2 * TOKENS * ROWS * NUMBER_BYTES


def test_keys_apart_become_tiles_of_the_kernel():
    assert work("apart") == work("joined")


def test_tokens_that_tiles_lack_are_not_counted():
    """Three latents of 5 x 5 in tiles of 2 x 4 x 4: blocks of 32, 8, 8, 2, 16, 4, 4 and 1."""
    layout = KvLayout.build(("current",), ((3, 5, 5),), (2, 4, 4))
    q_grid = BlockGrid((3, 5, 5), (2, 4, 4))
    flops, _ = work_of(ROWS, NUMBER_BYTES, layout, q_grid, "sparse", 8, True)
    assert flops == 4 * ROWS * (8 * 32) * 75
    gathered, _ = work_of(ROWS, NUMBER_BYTES, layout, q_grid, "sparse", 8, False)
    assert gathered == 4 * ROWS * (8 * 32) * 75
    half, _ = work_of(ROWS, NUMBER_BYTES, layout, q_grid, "sparse", 4, True)
    assert half == 4 * ROWS * (8 * 32) * (75 // 2)


def test_one_piece_is_not_copied():
    layout = KvLayout.build(("current",), ((4, 8, 8),), (4, 4, 4))
    q_grid = BlockGrid((4, 8, 8), (4, 4, 4))
    assert work_of(ROWS, NUMBER_BYTES, layout, q_grid, "joined", 0, True)[1] == 0


def test_sparse_work_is_that_of_the_visited_blocks_and_their_choice():
    flops, moved = work("sparse", tile=(1, 8, 8))
    blocks = 1 + 20 + 4
    assert flops == 4 * ROWS * 256 * (10 * TOKENS // blocks)
    assert moved == (256 + TOKENS) * ROWS * NUMBER_BYTES


def test_tiles_that_lie_in_runs_are_not_copied():
    assert work("sparse", tile=(1, 8, 8))[1] < work("sparse", tile=(4, 4, 4))[1]


def test_gathering_copies_less_for_larger_query_tiles():
    small, large = (work("sparse", q_tile=q, compiled=False)[1] for q in ((4, 4, 4), (4, 8, 8)))
    assert large < small


def test_idle_lanes_of_small_query_blocks_count():
    assert (
        work("sparse", tile=(1, 4, 4))[0]
        == 2 * work("sparse", tile=(2, 4, 4), visited_blocks=5)[0]
    )


def test_expressions_are_in_the_sizes_of_the_call():
    flops, moved = expressions()
    assert {str(one) for one in flops.free_symbols} == {"rows", "q_slots", "visited"}
    assert {str(one) for one in (flops + moved).free_symbols} == set(Sizes._fields)


@pytest.mark.parametrize("form", ["joined", "apart", "sparse"])
def test_work_grows_with_the_keys(form):
    longer = KvLayout.build(ROLES, (GRIDS[0], (40, 8, 8), GRIDS[2]), (1, 8, 8))
    q_grid = BlockGrid(GRIDS[-1], (1, 8, 8))
    more = work_of(ROWS, NUMBER_BYTES, longer, q_grid, form, 20, True)
    assert sum(more) > sum(work(form, tile=(1, 8, 8)))
