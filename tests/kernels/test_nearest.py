"""Keys and queries sorted by direction: against the definition, in each provider."""

import math

import pytest
import torch
from kernel_cases import NO_NATIVE, PROVIDERS, arguments, dense, make_case
from torch.nn import functional as F

import lipass.kernels.ops  # noqa: F401  (registers the operator)
from lipass.kernels import registry
from lipass.kernels.block_sparse.api import block_sparse_attention
from lipass.kernels.nearest import halves, reference
from lipass.kernels.nearest.basis import _start, along, basis_of
from lipass.kernels.nearest.order import among_frames, pool_in_order, sort_keys, sort_queries
from lipass.kernels.nearest.plan import Buckets, in_rows, plan_in_order

sparse_attention = torch.ops.lipass.sparse_attention
FORMS = [
    "vectorized",
    pytest.param("native", marks=pytest.mark.skipif(NO_NATIVE is not None, reason=f"{NO_NATIVE}")),
]


def sort(form, at, first, block):
    if form == "native":
        return torch.ops.lipass_native.sort_by_halves(at, first, block)
    return halves.sort_by_halves(at, first, block)


def case_of(frames=6, size=(4, 4), text=5, tile=(2, 2, 2), **options):
    torch.manual_seed(0)
    return make_case("decode", frames, size, text, tile, **options)


def sorted_history(case, sink_latents=1, axes=4):
    """Return order and basis of the history of a case."""
    history, grid = case.keys[1], case.layout.segments[1].grid
    first = sink_latents * math.prod(grid.grid[1:])
    basis = basis_of(history, axes, 0, first)
    return sort_keys(history, basis, first, case.layout.block_tokens), basis


def attend(case, order, basis, **options):
    named = {
        name: options.pop(name)
        for name in ("key_bias", "history_means", "planner", "latent_mask")
        if name in options
    }
    return sparse_attention(
        *arguments(case, **options),
        **{"planner": "buckets", "history_order": order, "history_basis": basis} | named,
    )


def by_definition(case, order, basis, *, budget=None, sink_latents=1, hidden=None):
    """Attend densely to what the definition says that each query sees."""
    budget = case.options["budget"] if budget is None else budget
    blocks = case.q_grid.block_tokens, case.layout.block_tokens
    first = sink_latents * math.prod(case.layout.segments[1].grid.grid[1:])
    q_order = sort_queries(case.q, basis, blocks[0])
    seen = torch.zeros(*case.q.shape[:3], case.keys[1].shape[2], dtype=torch.bool)
    for b in range(seen.shape[0]):
        for h in range(seen.shape[1]):
            orders = q_order[b, h].long(), order[b, h].long()
            seen[b, h] = reference.seen_keys(
                case.q[b, h], case.keys[1][b, h], orders, first, budget, blocks
            )
    if hidden is not None:
        seen &= ~hidden
    others = [seen.new_ones(*seen.shape[:3], case.keys[n].shape[2]) for n in (0, 2)]
    mask = torch.cat([others[0], seen, others[1]], -1)
    k, v = torch.cat(case.keys, 2), torch.cat(case.values, 2)
    return F.scaled_dot_product_attention(
        case.q, k, v, attn_mask=mask, scale=case.options["scale"]
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("tokens", "first", "block"), [(64, 0, 8), (61, 0, 8), (50, 5, 8), (3, 9, 4), (0, 4, 4)]
)
def test_order_is_that_of_the_definition(form, tokens, first, block):
    at = torch.randn(2, 2, tokens, 3) * torch.tensor([1.0, 3.0, 0.5])
    found = sort(form, at, first, block)
    for b in range(2):
        for h in range(2):
            expected = reference.order_of(at[b, h], first, block)
            assert torch.equal(found[b, h].long(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_equal_tokens_stay_in_their_order(form):
    found = sort(form, torch.ones(1, 1, 20, 3), 0, 4)
    assert torch.equal(found[0, 0], torch.arange(20, dtype=torch.int32))


def test_basis_holds_the_directions_in_which_keys_differ_most():
    scale = torch.tensor([0.1, 5.0, 0.2, 2.0, 0.1, 0.3, 0.1, 0.1])
    keys = 7.0 + torch.randn(1, 2, 5000, 8) * scale
    basis = basis_of(keys, 2, 0, 0)
    assert basis[0, :, 1, 0].abs().min() > 4.5
    assert basis[0, :, 3, 1].abs().min() > 1.8
    assert torch.equal(basis, basis_of(keys, 2, 0, 0))


def test_keys_that_all_move_keep_their_order():
    keys = torch.randn(1, 2, 96, 8)
    basis = basis_of(keys, 4, 0, 0)
    moved = keys + torch.randn(1, 2, 1, 8)
    assert torch.equal(sort_keys(keys, basis, 0, 8), sort_keys(moved, basis, 0, 8))


@pytest.mark.parametrize("kind", ["nan", "inf", "zero", "equal", "none"])
def test_odd_keys_are_sorted_somewhere(kind):
    keys = torch.randn(1, 2, 0 if kind == "none" else 48, 8)
    if kind in ("nan", "inf"):
        keys[0, 0, 3] = float(kind)
    elif kind in ("zero", "equal"):
        keys = keys * 0 + (kind == "equal")
    basis = basis_of(keys, 4, 0, 0)
    assert basis.isfinite().all()
    order = sort_keys(keys, basis, 0, 8)
    every = torch.arange(keys.shape[2], dtype=torch.int32)
    assert torch.equal(order.sort(-1).values, every.expand_as(order))


def test_more_axes_than_a_head_has_dims_are_its_dims():
    assert basis_of(torch.randn(1, 1, 30, 4), 8, 0, 0).shape == (1, 1, 4, 4)


def test_means_are_over_the_places_of_a_block():
    keys = torch.randn(1, 2, 20, 8)
    order = sort_keys(keys, basis_of(keys, 4, 0, 0), 0, 8)
    expected = keys[0, 1, order[0, 1].long()][16:].mean(0)
    torch.testing.assert_close(pool_in_order(keys, order, 8)[0, 1, 2], expected)


@pytest.mark.parametrize("budget", [0.1, 0.5])
@pytest.mark.parametrize("sink_latents", [0, 1])
def test_call_is_that_of_the_definition(budget, sink_latents):
    case = case_of(batch=2)
    found = sorted_history(case, sink_latents)
    with registry.force("sparse"):
        out = attend(case, *found, budget=budget, sink_latents=sink_latents)
    expected = by_definition(case, *found, budget=budget, sink_latents=sink_latents)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("biased", [False, True])
def test_providers_agree_on_keys_that_are_sorted(provider, biased):
    case = case_of(text=3, frames=5, size=(3, 3), tile=(2, 2, 2))
    layout, q_grid = in_rows(case.layout, case.q_grid)
    plan = plan_in_order(
        case.q, case.keys, layout, q_grid, Buckets(*sorted_history(case)),
        budget=0.4, scale=0.3, first=9,
    )  # fmt: skip
    bias = torch.randn(1, 2, layout.tokens) if biased else None
    k, v = torch.cat(case.keys, 2), torch.cat(case.values, 2)
    score = case.q @ k.mT * 0.3 + (0.0 if bias is None else bias[:, :, None])
    score = score.masked_fill(~plan.to_dense_mask(), -math.inf)
    out, lse = block_sparse_attention(
        case.q, case.keys, case.values, plan,
        scale=0.3, key_bias=bias, return_lse=True, provider=provider,
    )  # fmt: skip
    torch.testing.assert_close(out, score.softmax(-1) @ v, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, score.logsumexp(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(NO_NATIVE is not None, reason=f"{NO_NATIVE}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sorted_keys_in_16_bits(dtype):
    case = case_of(text=33, frames=9, size=(5, 7), tile=(1, 8, 8), dim=64, dtype=dtype)
    layout, q_grid = in_rows(case.layout, case.q_grid)
    plan = plan_in_order(
        case.q, case.keys, layout, q_grid, Buckets(*sorted_history(case)),
        budget=0.4, scale=0.125, first=35,
    )  # fmt: skip
    found, exact = (
        block_sparse_attention(
            case.q, case.keys, case.values, plan, scale=0.125, provider=provider
        )
        for provider in ("native", "reference")
    )
    torch.testing.assert_close(found, exact, atol=1e-2, rtol=1e-2)


def test_means_that_are_known_are_those_of_runs_of_the_order():
    """A tile that hangs over the grid holds fewer tokens than a run."""
    case = case_of(frames=5, size=(3, 5), tile=(2, 2, 2))
    found = sorted_history(case)
    means = pool_in_order(case.keys[1], found[0], 8)
    with registry.force("sparse"):
        known, computed = (
            attend(case, *found, **named) for named in ({"history_means": means}, {})
        )
    assert torch.equal(known, computed)
    assert torch.allclose(known, by_definition(case, *found), atol=1e-5)


@pytest.mark.parametrize("budget", [0.999, 1.0])
def test_every_block_is_dense_attention(budget):
    case = case_of()
    with registry.force("sparse"):
        out = attend(case, *sorted_history(case), budget=budget)
    torch.testing.assert_close(out, dense(case), atol=1e-5, rtol=1e-5)


def test_dropped_frames_leave_the_order():
    case = case_of(frames=6)
    keep = torch.tensor([[True, False, True, True, False, True]])
    order, basis = sorted_history(case)
    with registry.force("sparse"):
        out = attend(case, order, basis, keep_frames=keep)
    kept = keep[0].nonzero()[:, 0]
    grid = case.layout.segments[1].grid
    short = case_of(frames=4)
    short.q, short.keys, short.values = (
        case.q,
        *(
            [x[0], x[1].unflatten(2, (6, -1))[:, :, kept].flatten(2, 3), x[2]]
            for x in (case.keys, case.values)
        ),
    )
    expected = by_definition(short, among_frames(order, grid, keep[0]), basis)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_frames_that_differ_in_a_batch_are_hidden():
    case = case_of(frames=3, batch=2)
    keep = torch.tensor([[True, False, True], [True, True, False]])
    found = sorted_history(case)
    with registry.force("sparse"):
        out = attend(case, *found, keep_frames=keep)
    hidden = ~keep.repeat_interleave(16, 1)[:, None, None]
    expected = by_definition(case, *found, hidden=hidden)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planner": "mean"}, "must come with planner 'buckets'"),
        ({"history_order": None}, "must come with planner 'buckets'"),
        ({"history_order": torch.zeros(1, 2, 4, dtype=torch.int32)}, "history_order must be"),
        ({"history_basis": torch.zeros(1, 2, 5, 4)}, "history_basis must be"),
        ({"latent_mask": torch.ones(1, 2, 8, dtype=torch.bool)}, "latent_mask must come alone"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = case_of()
    order, basis = sorted_history(case)
    named = {"planner": "buckets", "history_order": order, "history_basis": basis} | change
    with pytest.raises(ValueError, match=message):
        sparse_attention(*arguments(case), **named)


def test_a_history_is_what_is_sorted():
    case = make_case("prefill", 4, (4, 4), 5, (2, 2, 2))
    basis = basis_of(case.keys[1], 4, 0, 0)
    order = sort_keys(case.keys[1], basis, 0, 8)
    with pytest.raises(ValueError, match="sorts a history, got a call of role 'prefill'; use"):
        attend(case, order, basis)


def test_sizes_that_cannot_be_are_refused():
    keys = torch.randn(1, 1, 8, 4)
    with pytest.raises(ValueError, match=r"axes must be in \[1, 16\], got 0; use 8"):
        torch.ops.lipass.key_basis(keys, 0, 0, 0)
    with pytest.raises(ValueError, match="first must be >= 0 and block >= 1, got -1 and 8"):
        sort_keys(keys, basis_of(keys, 2, 0, 0), -1, 8)


def test_operators_pass_opcheck():
    case = case_of(frames=2)
    keys = case.keys[1]
    tests = ("test_schema", "test_faketensor")
    order, basis = sorted_history(case)
    operators = torch.ops.lipass
    for operator, given in (
        (operators.key_basis, (keys, 4, 0, 16)),
        (operators.key_order, (keys, basis, 16, 8)),
        (operators.pool_in_order, (keys, order, 8)),
    ):
        torch.library.opcheck(operator.default, given, test_utils=tests)


def test_coordinates_of_queries_are_as_wide_as_their_scores_differ():
    keys, q = torch.randn(1, 1, 4000, 4) * torch.tensor([3.0, 1.0, 1.0, 1.0]), torch.eye(4)
    at = along(q[None, None], basis_of(keys, 1, 0, 0))
    assert int(at[0, 0, :, 0].abs().argmax()) == 0
    assert at.abs().max() == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_start_has_one_dtype_whatever_the_default_is(dtype):
    keys = torch.randn(1, 2, 40, 16)
    expected = basis_of(keys, 4, 0, 0)
    _start.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        found = basis_of(keys, 4, 0, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert torch.equal(basis_of(keys, 4, 0, 0), expected)
