"""Calls in an autocast: the results have the dtype and the digits of calls outside of it."""

import pytest
import torch
from kernel_cases import arguments, make_case

import lipass.kernels.ops  # noqa: F401  (registers the operators)
from lipass.kernels import (
    block_sparse_attention,
    calibration,
    dense,
    distinct,  # noqa: F401
    merged_history,  # noqa: F401
    registry,
    steered,  # noqa: F401
)
from lipass.kernels.autocast import is_cast
from lipass.kernels.view_overlap.api import may_see, view_overlap

ops = torch.ops.lipass


def both(function):
    """Call in an autocast and outside of it."""
    plain = function()
    with torch.autocast("cpu", torch.bfloat16):
        cast = function()
        assert torch.is_autocast_enabled("cpu")
    return cast, plain


def drawn(*tokens):
    return [torch.randn(1, 2, n, 16) for n in tokens]


@pytest.mark.parametrize("route", ["sparse", "dense"])
@pytest.mark.parametrize("biased", [False, True])
def test_sparse_attention(route, biased, machine):
    case = make_case("decode", 6, (4, 4), 7, (1, 4, 4), dim=16)
    bias = torch.randn(1, case.layout.tokens) if biased else None
    with registry.force(route):
        for operator in (ops.sparse_attention, ops.sparse_attention_lse):
            cast, plain = both(lambda: operator(*arguments(case), key_bias=bias))  # noqa: B023
            torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_a_plan_and_what_follows_it(machine):
    case = make_case("decode", 8, (4, 4), 7, (1, 4, 4), dim=16)
    cast, plain = both(case.plan)
    assert torch.equal(cast.indices, plain.indices)
    call = {"q": case.q, "k": case.keys, "v": case.values, "plan": plain}
    cast, plain = both(lambda: block_sparse_attention(**call))
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_other_attention(machine):
    q, k, v = drawn(32, 128, 128)
    count, bias = torch.tensor(9), torch.zeros(1, 1, 2, 128)
    k[:, :, 8:], v[:, :, 8:] = k[:, :, 8:9], v[:, :, 8:9]
    for call in (
        lambda: ops.attend_pieces(q, [k, k], [v, v], 0.25, "site"),
        lambda: ops.attend_merged(q, [k, q], [v, q], 0, 16, 0.25, 0.9, None, 1, "site"),
        lambda: ops.attend_distinct(q, k, v, count, 0.25, "site"),
        lambda: ops.attend_steered(q, k, v, bias, 0.25),
    ):
        torch.testing.assert_close(*both(call), rtol=0, atol=0)


def test_sorting(machine):
    (k,) = drawn(128)
    cast, plain = both(lambda: ops.key_basis(k, 4, 0, 0))
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
    cast, plain = both(lambda: ops.key_order(k, plain, 0, 16))
    assert torch.equal(cast, plain)


def test_poses_far_from_the_origin():
    poses = torch.eye(4).repeat(5, 1, 1)
    poses[:, :3, 3] = 1000 + torch.randn(5, 3)
    for overlap in (view_overlap, may_see):
        options = (90.0, 60.0, 0.5, 8.0)
        cast, plain = both(lambda: overlap(poses[:2], poses, *options))  # noqa: B023
        assert torch.equal(cast, plain)


@pytest.mark.parametrize("step", ["measure", "_beaten"])
def test_rates_of_fp32_are_measured_in_fp32(step, monkeypatch):
    seen, attend = [], dense.attend_joined

    def watched(*call):
        seen.append(attend(*call).dtype)

    monkeypatch.setattr(dense, "attend_joined", watched)
    form = calibration.Form(0.0, 1e9, 1e9)
    rates = calibration.Rates(form, None, form)
    with torch.autocast("cpu", torch.bfloat16):
        if step == "measure":
            calibration.measure(torch.float32, 16, False)
        else:
            calibration._beaten(rates, torch.float32, 16, False, False)
    assert set(seen) == {torch.float32}


def test_devices_without_an_autocast():
    assert not is_cast(torch.device("meta"))
    assert not is_cast(torch.device("cpu"))
