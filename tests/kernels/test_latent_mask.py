"""Queries see the latents that a mask shows them, whatever runs and whatever the budget."""

import pytest
import torch
from kernel_cases import PROVIDERS, arguments, make_case

import lipass.kernels.ops  # noqa: F401 registers the operator
from lipass.kernels import registry
from lipass.kernels.block_sparse.api import block_sparse_attention
from lipass.kernels.latent_mask import seen_blocks, seen_keys
from lipass.kernels.pool.api import pool_blocks
from lipass.kernels.select.api import select_blocks

sparse_attention = torch.ops.lipass.sparse_attention.default
sparse_attention_lse = torch.ops.lipass.sparse_attention_lse.default
TILE = (1, 3, 4)


def causal(frames, batch=1):
    return torch.ones(frames, frames, dtype=torch.bool).tril().expand(batch, -1, -1)


def window(frames):
    """The first latent, and the latest two."""
    at = torch.arange(frames)
    near = (at[:, None] - at).abs() < 2
    return (near | (at == 0))[None]


def expected(case, mask):
    """Attend densely where the mask, spelled out for tokens, shows."""
    k, v = torch.cat(case.keys, 2), torch.cat(case.values, 2)
    shown = []
    latent = 0
    for part in case.layout.segments:
        frames, y, x = part.grid.grid
        for _ in range(frames):
            column = torch.ones_like(mask[:, :, 0]) if part.role == "text" else mask[:, :, latent]
            latent += part.role != "text"
            shown += [column] * (y * x)
    rows = torch.stack(shown, -1).repeat_interleave(case.q.shape[2] // mask.shape[1], 1)
    score = (case.q @ k.mT * case.options["scale"]).masked_fill(~rows[:, None], -torch.inf)
    return score.softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("route", ["sparse", "dense"])
@pytest.mark.parametrize("mask", [causal(6), window(6)], ids=["causal", "window"])
def test_budget_one_is_masked_attention(route, mask):
    case = make_case("prefill", 6, (5, 6), 7, TILE, budget=1.0, batch=2)
    with registry.force(route):
        out = sparse_attention(*arguments(case), latent_mask=mask)
        again, lse = sparse_attention_lse(*arguments(case), latent_mask=mask)
    torch.testing.assert_close(out, expected(case, mask))
    torch.testing.assert_close(again, out)
    assert lse.isfinite().all()


def test_a_decode_call_masks_its_own_frames_too():
    mask = torch.rand(1, 2, 5) < 0.6
    case = make_case("decode", 3, (3, 4), 3, TILE, budget=1.0)
    with registry.force("sparse"):
        out = sparse_attention(*arguments(case), latent_mask=mask)
    torch.testing.assert_close(out, expected(case, mask))


def test_each_batch_item_has_a_mask_of_its_own():
    mask = torch.stack([causal(4)[0], window(4)[0]])
    case = make_case("prefill", 4, (3, 4), 0, TILE, budget=1.0, batch=2)
    with registry.force("sparse"):
        out = sparse_attention(*arguments(case), latent_mask=mask)
    torch.testing.assert_close(out, expected(case, mask))


def test_a_latent_that_sees_nothing_gives_zeros():
    mask = causal(4).clone()
    mask[:, 2] = False
    case = make_case("prefill", 4, (3, 4), 0, TILE, budget=0.5)
    for route in ("sparse", "dense"):
        with registry.force(route):
            out = sparse_attention(*arguments(case), latent_mask=mask)
        assert (out[:, :, 24:36] == 0).all()
        assert out.isfinite().all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_every_provider_stays_inside_of_the_mask(provider, role):
    case = make_case(role, 5, (5, 6), 7, TILE, budget=0.4)
    mask = causal(5) if role == "prefill" else torch.rand(1, 2, 7) < 0.5
    plan = case.plan(keep_frames=None, latent_mask=mask)
    seen = seen_keys(mask, case.q_grid, case.layout)
    assert not (plan.to_dense_mask() & ~seen).any()
    out = block_sparse_attention(case.q, case.keys, case.values, plan, provider=provider)
    reference = block_sparse_attention(case.q, case.keys, case.values, plan, provider="reference")
    torch.testing.assert_close(out, reference)


@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_vectorized_selection_equals_its_definition(role, budget):
    case = make_case(role, 6, (5, 6), 7, TILE, batch=2)
    rows = case.q_grid.grid[0]
    mask = torch.rand(2, rows, 6 if role == "prefill" else 8) < 0.6
    number = case.layout.candidate_segment(role)
    grid = case.layout.segments[number].grid
    given = (pool_blocks(case.q, case.q_grid), pool_blocks(case.keys[number], grid))
    options = {"budget": budget, "scale": 1.0, "role": role, "sink_latents": 1}
    seen = seen_blocks(mask, case.q_grid, case.layout)
    found = [
        select_blocks(*given, case.layout, case.q_grid, **options, seen=seen, provider=provider)
        for provider in ("reference", "vectorized")
    ]
    (indices, counts), (fast, fast_counts) = found
    assert torch.equal(counts, fast_counts)
    width = indices.shape[-1]
    assert torch.equal(indices, fast[..., :width])
    assert (fast[..., width:] == -1).all()


def test_the_budget_is_of_what_a_latent_sees():
    """Of 6 blocks a latent, the last of 8 latents may visit 48 and the second 12."""
    case = make_case("prefill", 8, (6, 12), 0, TILE, budget=0.5, sink_latents=0)
    plan = case.plan(keep_frames=None, latent_mask=causal(8))
    counts = plan.counts[0, 0].view(8, 6)
    assert (counts[1] <= 12).all()
    assert (counts[7] < 48).all()
    assert (counts[7] > counts[3]).all()


def test_hidden_blocks_are_not_counted_as_visited():
    registry.reset_telemetry()
    case = make_case("prefill", 6, (5, 6), 0, TILE, budget=1.0)
    with registry.force("sparse"):
        sparse_attention(*arguments(case, site="masked"), latent_mask=causal(6))
    assert registry.telemetry()["masked"].density == pytest.approx(21 / 36)


@pytest.mark.parametrize(
    ("mask", "tile", "message"),
    [
        (causal(6), (2, 3, 4), "tiles of one latent"),
        (causal(5), TILE, r"got \[1, 5, 5\]"),
        (causal(6).float(), TILE, "bool"),
        (causal(6, batch=3), TILE, r"got \[3, 6, 6\]"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, tile, message):
    case = make_case("prefill", 6, (5, 6), 3, tile)
    with pytest.raises(ValueError, match=message):
        sparse_attention(*arguments(case), latent_mask=mask)


def test_dropped_frames_and_a_mask_exclude_each_other():
    case = make_case(
        "prefill", 3, (3, 4), 0, TILE, keep_frames=torch.tensor([[True, True, False]])
    )
    with pytest.raises(ValueError, match="latent_mask must come alone"):
        sparse_attention(*arguments(case), latent_mask=causal(3))


def test_operator_with_a_mask_is_well_formed():
    case = make_case("prefill", 4, (3, 4), 3, TILE)
    torch.library.opcheck(sparse_attention, arguments(case), {"latent_mask": causal(4)})
