"""Planner "cosine": blocks are ranked by the cosine of means, however long the means are."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from kernel_cases import arguments, cases, make_case

import lipass.kernels.ops  # noqa: F401
from lipass.kernels import registry
from lipass.kernels.pool.api import pool_blocks
from lipass.kernels.select.api import select_blocks

sparse_attention = torch.ops.lipass.sparse_attention


def by_definition(case):
    """Choose by `cos(q, k)` itself, in the place of `q . k`: one key axis a block holds it."""
    candidate = case.layout.candidate_segment(case.options["role"])
    grid = case.layout.segments[candidate].grid
    q, k = pool_blocks(case.q, case.q_grid), pool_blocks(case.keys[candidate], grid)
    cosines = torch.cosine_similarity(q[:, :, :, None], k[:, :, None], -1, eps=1e-12)
    axes = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
    return select_blocks(
        cosines, axes, case.layout, case.q_grid, provider="reference", **case.options
    )


def stretched(case):
    """Give keys of very different lengths, so that products and cosines rank differently."""
    keys = [key * torch.rand(*key.shape[:3], 1).exp2().pow(4) for key in case.keys]
    return dataclasses.replace(case, keys=keys)


@settings(max_examples=60)
@given(cases())
def test_plan_is_that_of_the_definition(case):
    case = stretched(case)
    plan = case.plan(planner="cosine")
    expected, counts = by_definition(case)
    assert torch.equal(plan.counts, counts)
    assert torch.equal(plan.indices[..., : expected.shape[-1]], expected)


def test_a_long_mean_wins_by_product_and_not_by_cosine():
    case = make_case("decode", 4, (4, 4), 6, (1, 4, 4), budget=0.25, sink_latents=0, heads=1)
    case.q.fill_(0.0)[..., 0] = 1.0
    history = case.keys[1].view(4, 16, 8)
    history.zero_()
    history[0, :, :2] = torch.tensor([9.0, 20.0])  # long, and aslant
    history[2, :, 0] = 0.1  # short, and in the direction of the queries
    first = case.layout.block_range(1).start
    for planner, best in (("mean", 0), ("cosine", 2)):
        plan = case.plan(planner=planner)
        chosen = set(plan.indices[0, 0, 0].tolist()) & set(case.layout.block_range(1))
        assert chosen == {first + best}


@pytest.mark.parametrize("pooled", [False, True])
def test_operator_ranks_by_cosine_with_means_given_or_not(pooled):
    case = stretched(make_case("decode", 6, (4, 5), 20, (1, 4, 4), batch=2, heads=3, dim=16))
    grid = case.layout.segments[1].grid
    means = pool_blocks(case.keys[1], grid) if pooled else None
    blocks, counts = by_definition(case)
    with registry.force("sparse"):
        out = sparse_attention(*arguments(case), planner="cosine", history_means=means)
        expected = sparse_attention(
            *arguments(case), planner="given", blocks=blocks, block_counts=counts
        )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert registry.telemetry()["site"].density < 1.0


def test_budget_one_is_dense_whatever_ranks():
    case = stretched(make_case("prefill", 5, (4, 5), 20, (2, 4, 4)))
    with registry.force("sparse"):
        both = [
            sparse_attention(*arguments(case, budget=1.0), planner=planner)
            for planner in ("mean", "cosine")
        ]
    assert torch.equal(*both)
