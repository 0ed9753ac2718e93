"""Planner "given": the caller says which blocks are visited."""

import pytest
import torch
from kernel_cases import PROVIDERS, arguments, make_case, masked_dense

import lipass.kernels.ops  # noqa: F401
from lipass.kernels import registry
from lipass.kernels.block_sparse.api import block_sparse_attention
from lipass.kernels.given import GivenBlocks
from lipass.kernels.plan import BlockPlan

sparse_attention = torch.ops.lipass.sparse_attention


@pytest.fixture
def case():
    return make_case("decode", 6, (4, 5), 20, (1, 4, 4), batch=2, heads=3, dim=16)


def draw(case, counted):
    """Draw rows of blocks that ascend; of some, only the first few count."""
    rows = (2, 3, case.q_grid.blocks)
    order = torch.rand(*rows, case.layout.blocks).argsort(-1)[..., :5]
    blocks = order.sort(-1).values
    return blocks, torch.randint(1, 6, rows) if counted else None


def expected(case, blocks, counts):
    rows = (2, 3, case.q_grid.blocks)
    if counts is None:
        counts = torch.full(rows, blocks.shape[-1])
    plan = BlockPlan(
        blocks.expand(*rows, -1).int(), counts.expand(rows).int(), case.q_grid, case.layout
    )
    return masked_dense(case, plan)[0]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("counted", [False, True])
def test_each_provider_visits_what_is_given(case, provider, counted):
    blocks, counts = draw(case, counted)
    plan = case.plan(planner="given", given=GivenBlocks(blocks, counts))
    out = block_sparse_attention(
        case.q, case.keys, case.values, plan, scale=case.options["scale"], provider=provider
    )
    torch.testing.assert_close(out.double(), expected(case, blocks, counts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [(), (0,), (0, 1)])
def test_operator_visits_what_is_given_whatever_the_budget(case, shared):
    blocks, counts = draw(case, counted=True)
    for axis in shared:
        blocks, counts = (x.narrow(axis, 0, 1) for x in (blocks, counts))
    with registry.force("sparse"):
        out = sparse_attention(
            *arguments(case, budget=1.0), planner="given", blocks=blocks, block_counts=counts
        )
    torch.testing.assert_close(out.double(), expected(case, blocks, counts), atol=1e-5, rtol=1e-5)
    assert registry.telemetry()["site"].density < 1.0


def test_the_gate_may_keep_it_dense(case):
    blocks, _ = draw(case, counted=False)
    with registry.force("dense"):
        out = sparse_attention(*arguments(case), planner="given", blocks=blocks)
    whole = sparse_attention(*arguments(case, budget=1.0))
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)


def test_every_block_given_is_dense_attention(case):
    blocks = torch.arange(case.layout.blocks).expand(1, 1, case.q_grid.blocks, -1)
    with registry.force("sparse"):
        out = sparse_attention(*arguments(case), planner="given", blocks=blocks)
    whole = sparse_attention(*arguments(case, budget=1.0))
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda blocks: {"planner": "best", "blocks": blocks},
            "planner must be one of mean, cosine, given",
        ),
        (lambda blocks: {"planner": "given"}, "got none with planner 'given'"),
        (lambda blocks: {"blocks": blocks}, "got blocks with planner 'mean'"),
        (lambda blocks: {"planner": "given", "blocks": blocks[:, :, 1:]}, "blocks must be"),
        (lambda blocks: {"planner": "given", "blocks": blocks[0]}, "blocks must be"),
        (lambda blocks: {"planner": "given", "blocks": blocks.float()}, "int32 or int64"),
        (lambda blocks: {"planner": "given", "blocks": blocks + 99}, "numbered from 0"),
        (lambda blocks: {"planner": "given", "blocks": blocks - 99}, "numbered from 0"),
        (lambda blocks: {"planner": "given", "blocks": blocks.flip(-1)}, "must ascend"),
        (lambda blocks: {"planner": "given", "blocks": blocks * 0}, "must ascend"),
        (
            lambda blocks: {
                "planner": "given",
                "blocks": blocks,
                "block_counts": torch.full(blocks.shape[:3], 9),
            },
            r"block_counts must be in \[0, 5\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(case, change, message):
    blocks, _ = draw(case, counted=False)
    with pytest.raises(ValueError, match=message):
        sparse_attention(*arguments(case), **change(blocks))


def test_padding_behind_the_counts_may_be_anything(case):
    blocks, counts = draw(case, counted=True)
    behind = torch.arange(5) >= counts[..., None]
    with registry.force("sparse"):
        out = sparse_attention(
            *arguments(case), planner="given", blocks=blocks.masked_fill(behind, -1),
            block_counts=counts,
        )  # fmt: skip
    torch.testing.assert_close(out.double(), expected(case, blocks, counts), atol=1e-5, rtol=1e-5)


def test_frames_are_dropped_by_the_plan_not_beside_it(case):
    blocks, _ = draw(case, counted=False)
    keep = torch.ones(2, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="leave the blocks of dropped frames out"):
        sparse_attention(*arguments(case, keep_frames=keep), planner="given", blocks=blocks)
