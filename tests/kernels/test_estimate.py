"""The attention mass that a plan keeps: sampled, counted, and shown in the receipt."""

import math

import pytest
import torch
from kernel_cases import arguments, make_case

import lipass.kernels.ops  # noqa: F401  (registers the operator)
from lipass.kernels import registry
from lipass.kernels.estimate import kept_mass
from lipass.kernels.nearest.basis import basis_of
from lipass.kernels.nearest.order import sort_keys
from lipass.kernels.nearest.plan import Buckets, in_rows, plan_in_order


def case_of(**options):
    torch.manual_seed(0)
    return make_case("decode", 6, (4, 4), 5, (2, 2, 2), dim=16, **options)


def sorted_plan(case):
    basis = basis_of(case.keys[1], 4, 0, 0)
    buckets = Buckets(sort_keys(case.keys[1], basis, 0, 8), basis)
    return plan_in_order(
        case.q, case.keys, *in_rows(case.layout, case.q_grid), buckets,
        budget=0.3, scale=0.25, first=0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["tiles", "sorted"])
def test_mass_is_that_of_the_first_query_of_each_block(kind):
    case = case_of()  # four blocks of eight queries
    plan = case.plan() if kind == "tiles" else sorted_plan(case)
    bias = torch.randn(1, 2, plan.kv.tokens)
    keys = torch.cat(case.keys, 2)
    weights = (case.q @ keys.mT * 0.25 + bias[:, :, None]).softmax(-1)
    mass = (weights * plan.to_dense_mask()).sum(-1)
    if kind == "tiles":
        rows = plan.q_grid.token_index()[:, 0].expand(1, 2, -1)
    else:
        rows = plan.order.queries[:, :, ::8].long()
    found = kept_mass(case.q, case.keys, plan, 0.25, bias)
    torch.testing.assert_close(found, mass.gather(2, rows).mean())


@pytest.mark.parametrize("budget", [1.0, 0.4])
def test_what_the_model_hides_itself_is_not_lost(budget):
    registry.reset_telemetry()
    torch.manual_seed(0)
    case = make_case("prefill", 6, (4, 4), 0, (1, 4, 4), dim=16, budget=budget, batch=2)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None].repeat(2, 1, 1)
    mask[1, 2] = False  # a latent that sees nothing
    with registry.force("sparse"):
        torch.ops.lipass.sparse_attention(*arguments(case), latent_mask=mask)
    mass = registry.telemetry()["site"].mass
    if budget == 1.0:
        assert mass == pytest.approx(1.0)
    else:
        assert 0.5 < mass < 1.0


def test_output_moves_by_no_more_than_the_mass_says():
    case = case_of()
    plan = case.plan()
    weights = (case.q @ torch.cat(case.keys, 2).mT * 0.25).softmax(-1)
    mask, values = plan.to_dense_mask(), torch.cat(case.values, 2)
    kept = (weights * mask).sum(-1, keepdim=True)
    moved = ((weights * mask / kept) @ values - weights @ values).norm(dim=-1)
    longest = values.norm(dim=-1).amax(-1, keepdim=True)
    assert (moved <= 2 * (1 - kept[..., 0]) * longest + 1e-6).all()


def test_one_call_in_many_is_sampled():
    registry.reset_telemetry()
    case = case_of()
    with registry.force("sparse"):
        for _ in range(33):
            torch.ops.lipass.sparse_attention(*arguments(case))
    counts = registry.telemetry()["site"]
    assert counts.mass_samples == 2
    assert 0.2 < counts.mass < 1.0


def test_a_sample_records_no_gradient():
    case = case_of()
    found = kept_mass(case.q.requires_grad_(), case.keys, case.plan(), 0.25, None)
    assert not found.requires_grad


def test_keys_that_are_no_numbers_are_no_sample():
    registry.reset_telemetry()
    case = case_of()
    case.keys[0][0, 0, 0, 0] = math.nan
    with registry.force("sparse"):
        torch.ops.lipass.sparse_attention(*arguments(case))
    assert registry.telemetry()["site"].mass is None
