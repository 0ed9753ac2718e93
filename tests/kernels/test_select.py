"""Block selection: the whole-tensor form against the definition, and what every plan contains."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import NATIVE, NO_NATIVE, cases, make_case

from lipass.kernels.block_sparse import native
from lipass.kernels.plan import BlockGrid
from lipass.kernels.pool.api import pool_blocks
from lipass.kernels.select.api import select_blocks, selected_blocks
from lipass.kernels.select.vectorized import rule_of


def means(case):
    candidate = case.layout.candidate_segment(case.options["role"])
    grid = case.layout.segments[candidate].grid
    return pool_blocks(case.q, case.q_grid), pool_blocks(case.keys[candidate], grid)


def visited(plan):
    """Sets of block ids per row, in row order."""
    rows = plan.indices.flatten(0, 2).tolist()
    return [set(row[:count]) for row, count in zip(rows, plan.counts.flatten(), strict=True)]


@settings(max_examples=60)
@given(cases())
def test_vectorized_equals_reference(case):
    expected, counts = select_blocks(
        *means(case), case.layout, case.q_grid, provider="reference", **case.options
    )
    found, found_counts = select_blocks(
        *means(case), case.layout, case.q_grid, provider="vectorized", **case.options
    )
    width = expected.shape[-1]
    assert torch.equal(found_counts, counts)
    assert torch.equal(found[..., :width], expected)
    assert (found[..., width:] == -1).all()


@settings(max_examples=30)
@given(cases())
def test_rows_are_ascending_distinct_and_counted(case):
    plan = case.plan()
    rows, counts = plan.indices.flatten(0, 2), plan.counts.flatten()
    for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
        assert row[:count] == sorted(set(row[:count]))
        assert all(0 <= block < case.layout.blocks for block in row[:count])
        assert row[count:] == [-1] * (len(row) - count)


@pytest.mark.parametrize("frames", [1, 3, 5, 8])
def test_decode_keeps_text_current_and_sink(frames):
    case = make_case("decode", frames, (6, 7), 130, (4, 4, 4), budget=0.1, new_frames=5)
    text, history, current = (set(case.layout.block_range(n)) for n in range(3))
    sink = {list(sorted(history))[n] for n in range(4)}
    for row in visited(case.plan()):
        assert text | current | sink <= row


def test_prefill_keeps_text_and_tiles_one_step_away():
    case = make_case("prefill", 12, (8, 8), 3, (4, 4, 4), budget=0.01, sink_latents=0)
    near = case.q_grid.neighbours()
    for block, row in enumerate(visited(case.plan())[: case.q_grid.blocks]):
        assert {0} | {1 + k for k in near[block].nonzero()[:, 0].tolist()} <= row


def test_prefill_with_larger_query_tiles_keeps_the_tiles_around_all_of_them():
    case = make_case(
        "prefill", 6, (4, 4), 0, (1, 4, 4), q_tile=(2, 4, 4), budget=0.01, sink_latents=0
    )
    rows = visited(case.plan())[:3]
    assert {0, 1, 2} <= rows[0]
    assert {1, 2, 3, 4} <= rows[1]


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.5, 0.99, 1.0])
def test_counts_are_protected_plus_budget_share(budget):
    case = make_case("decode", 20, (8, 8), 32, (4, 4, 4), budget=budget)
    width = 1 + 4 + (4 + math.ceil(budget * 16))
    plan = case.plan()
    assert (plan.counts == width).all()
    assert plan.indices.shape[-1] == width
    assert selected_blocks(case.layout, case.q_grid, budget, "decode", 1) == width


def test_budget_rounds_like_its_decimal_text():
    case = make_case("decode", 30, (1, 2), 0, (1, 1, 2), budget=0.1, sink_latents=0)
    assert (case.plan().counts == 2 + 3).all()  # 0.1 * 30 is above 3 in fp64


def test_full_budget_visits_every_block():
    case = make_case("prefill", 5, (5, 6), 9, (2, 4, 4), budget=1.0)
    assert all(row == set(range(case.layout.blocks)) for row in visited(case.plan()))


def test_best_scores_win_and_heads_choose_for_themselves():
    case = make_case("decode", 8, (2, 2), 0, (1, 2, 2), budget=0.125, sink_latents=0, dim=4)
    case.q.fill_(1.0)
    for head, frame in enumerate((2, 5)):
        case.keys[1][:, head].zero_()
        case.keys[1][:, head, 4 * frame : 4 * frame + 4] = 1.0
    rows = visited(case.plan())
    assert [row & set(range(8)) for row in rows] == [{2}] * 2 + [{5}] * 2


@pytest.mark.parametrize("provider", ["reference", "vectorized", NATIVE])
def test_nan_scores_rank_last_and_leave_rows_whole(provider):
    case = make_case("decode", 8, (2, 2), 0, (1, 2, 2), budget=0.4, sink_latents=1)
    case.keys[1][:, :, [0, 12]] = math.nan  # of the sink, and of block 3
    case.q[:, 1, :4] = math.nan  # all that query block 0 of head 1 has
    if provider == "native":
        rows = case.plan().indices
    else:
        rows, _ = select_blocks(
            *means(case), case.layout, case.q_grid, provider=provider, **case.options
        )
    assert rows.shape == (1, 2, 2, 1 + math.ceil(0.4 * 7) + 2)
    assert (rows.diff() > 0).all()
    assert (rows[..., 0] == 0).all()
    assert (rows[..., -2:] == torch.tensor([8, 9])).all()
    numbers = torch.tensor([[True, True], [False, True]])
    assert not (rows[0, numbers] == 3).any()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_dropped_frames_are_absent_and_counts_fall(role):
    keep = torch.tensor([[True, False, False, True, True, False, True, False]])
    case = make_case(role, 8, (4, 4), 2, (1, 4, 4), budget=0.5, keep_frames=keep)
    first = 1  # behind one block of text
    dropped = {first + n for n in (1, 2, 5, 7)}
    plan, everything = case.plan(), case.plan(keep_frames=None)
    rows = visited(plan)
    for row in range(len(rows)):
        block = row % case.q_grid.blocks
        if role == "prefill" and not keep[0, block]:
            assert rows[row] == {0, first + block}
        else:
            assert not rows[row] & dropped
    assert plan.counts.sum() < everything.counts.sum()


def test_batch_items_drop_their_own_frames():
    keep = torch.tensor([[True] * 4, [True, False, False, False]])
    case = make_case("decode", 4, (2, 2), 0, (1, 2, 2), budget=1.0, keep_frames=keep, batch=2)
    assert case.plan().counts[:, 0, 0].tolist() == [6, 3]


def test_mixed_tiles_mask_dropped_tokens():
    keep = torch.tensor([[True, False]])
    case = make_case("decode", 2, (1, 2), 0, (2, 1, 2), keep_frames=keep, new_frames=1)
    assert case.plan().key_keep[0].tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0.0}, r"budget must be in \(0, 1\], got 0.0"),
        ({"budget": 1.5}, "got 1.5"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"role": "cross"}, "got 'cross'"),
        ({"keep_frames": torch.ones(1, 3, dtype=torch.bool)}, r"\[1, 4\], got \[1, 3\]"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    case = make_case("decode", 4, (2, 2), 1, (1, 2, 2))
    q_mean, k_mean = means(case)
    with pytest.raises(ValueError, match=message):
        select_blocks(q_mean, k_mean, case.layout, case.q_grid, **(case.options | changes))


def test_means_of_other_grids_are_refused():
    case = make_case("decode", 4, (2, 2), 1, (1, 2, 2))
    q_mean, k_mean = means(case)
    with pytest.raises(ValueError, match="pool them with the same grids"):
        select_blocks(q_mean, k_mean[:, :, :2], case.layout, case.q_grid, **case.options)
    with pytest.raises(ValueError, match="grid of the queries"):
        select_blocks(
            q_mean, k_mean, case.layout, BlockGrid((1, 2, 4), (1, 2, 2)),
            **(case.options | {"role": "prefill"}),
        )  # fmt: skip


@pytest.mark.skipif(NO_NATIVE is not None, reason=f"{NO_NATIVE}")
@settings(max_examples=60)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_native_equals_reference(case, dtype):
    candidate = case.layout.candidate_segment(case.options["role"])
    # Small integers: their sums are exact, so that equal scores are equal whatever the order.
    q, k = (x.mul(3).round().to(dtype) for x in (case.q, case.keys[candidate]))
    options = case.options | {"keep_frames": None}
    expected, _ = select_blocks(
        pool_blocks(q, case.q_grid),
        pool_blocks(k, case.layout.segments[candidate].grid),
        case.layout,
        case.q_grid,
        provider="reference",
        **options,
    )
    rule = rule_of(
        case.layout,
        case.q_grid,
        options["budget"],
        options["role"],
        options["sink_latents"],
        q.device,
    )
    found = native.plan_blocks(
        q.transpose(1, 2).contiguous().transpose(1, 2), k, case.q_grid, case.layout, rule
    )
    assert torch.equal(found, expected)
