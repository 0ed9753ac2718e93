import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lipass.passes.attention import token_grid
from lipass.passes.attention.match import Refusal
from lipass.passes.attention.site import SDPA
from lipass.passes.graph.calls import is_call


def attend(tokens):
    q = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q)


@pytest.fixture
def grid(trace, apply):
    def run(fn, args, grown=None):
        gm = trace(fn, args, grown)
        apply(gm, "canonicalize")
        call = next(node for node in gm.graph.nodes if is_call(node, SDPA))
        found = token_grid.infer(call.args[0], call.args[0].meta["example_value"].shape[2])
        return found.reason if isinstance(found, Refusal) else tuple(map(str, found))

    return run


def latents(frames=3, rows=4, columns=5):
    return torch.randn(1, 16, frames, rows, columns)


REFUSED = token_grid.NO_RESHAPE


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: attend(x.flatten(2).mT),
        lambda x: attend(x.reshape(1, 16, -1).mT),
        lambda x: attend(x.permute(0, 2, 3, 4, 1).flatten(1, 3)),
        lambda x: attend(x.permute(0, 2, 3, 4, 1).reshape(1, 60, 16)),
        lambda x: attend(x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(1, 2)),
        lambda x: attend(x.flatten(3).permute(0, 2, 3, 1).reshape(1, 60, 16)),
        lambda x: attend(F.layer_norm(x.flatten(2).mT, (16,)) * 2 + 1),
    ],
)
def test_reshapes_that_make_tokens(grid, fn):
    assert grid(fn, (latents(),)) == ("3", "4", "5")


def test_patch_convolution(grid):
    conv = nn.Conv3d(4, 16, (1, 2, 2), stride=(1, 2, 2))
    x = torch.randn(1, 4, 3, 8, 10)
    assert grid(lambda x: attend(conv(x).flatten(2).mT), (x,)) == ("3", "4", "5")


def test_frames_that_vary(grid):
    fn = lambda x: attend(x.flatten(2).mT)  # noqa: E731
    t, y, x = grid(fn, (latents(3),), (latents(6),))
    assert t.startswith("s")
    assert (y, x) == ("4", "5")


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: attend(x.flatten(2).mT),
        lambda x: attend(x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(1, 2)),
    ],
)
def test_frames_that_vary_and_are_now_as_many_as_rows(grid, fn):
    t, *_ = grid(fn, (latents(3),), (latents(4),))
    assert t.startswith("s")


def test_nearest_reshape_wins(grid):
    def fn(x):
        tokens = x.flatten(2).mT
        return attend(tokens.reshape(1, 3, 2, 10, 16).flatten(1, 3))

    assert grid(fn, (latents(),)) == ("3", "2", "10")


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: attend(x.flatten(2).mT[:, :59]),
        lambda x: attend(torch.cat([x.flatten(2).mT, x.new_zeros(1, 6, 16)], 1)),
        lambda x: attend(x[:, :, 0].flatten(2).mT),
        lambda x: attend(x.transpose(1, 2).reshape(3, 16, 20).mT),
        lambda x: attend(x.sum((2, 3)).mT),
    ],
)
def test_tokens_that_are_not_all_of_a_grid(grid, fn):
    assert grid(fn, (latents(),)) == REFUSED


def test_grid_behind_an_attention_does_not_count(grid):
    def fn(x):
        first = attend(x.flatten(2).mT)
        return attend(first.transpose(1, 2).flatten(2)[:, :30])

    assert grid(fn, (latents(),)) == ("3", "4", "5")


def test_features_are_no_grid(grid):
    def fn(x):
        return attend(x.reshape(1, 24, 2, 3, 4).flatten(2))

    assert grid(fn, (torch.randn(1, 24, 24),)) == REFUSED


def test_heads_and_features_of_as_many_as_a_frame_has_places_are_no_grid(grid):
    """An adapter joins heads and features within frames."""

    def fn(x):
        tokens = x.flatten(2).mT
        frames = tokens.unflatten(1, (3, -1)).unflatten(-1, (2, 8))
        tokens = tokens + frames.flatten(3).flatten(1, 2)
        return attend(tokens)

    assert grid(fn, (latents(3, 4, 4),)) == ("3", "4", "4")


def test_as_many_features_as_tokens_do_not_hide_the_grid(grid):
    x = torch.randn(1, 60, 3, 4, 5)
    assert grid(lambda x: attend(x.permute(0, 2, 3, 4, 1).reshape(1, 60, 60)), (x,)) == (
        "3",
        "4",
        "5",
    )


def test_factors_of_as_many_features_are_no_grid(grid):
    assert grid(lambda x: attend(x.reshape(1, 60, 60)), (torch.randn(1, 60, 3, 4, 5),)) == REFUSED


def test_an_axis_of_one_that_is_put_in_for_a_product_is_no_row_of_a_latent(grid):
    def by_latents(x):
        tokens = x.flatten(2).mT
        turned = tokens.unflatten(1, (3, 20, 1)) * torch.ones(3, 1, 1, 16)
        return attend(turned.flatten(1, 3))

    def alone(x):
        return attend(x.permute(0, 2, 3, 4, 1).flatten(1, 3))

    assert grid(by_latents, (latents(),)) == ("3", "4", "5")
    # Latents that are one place wide are a grid all the same.
    assert grid(alone, (latents(columns=1),)) == ("3", "4", "1")


def test_an_axis_of_one_that_counts_prompts_is_no_latent(grid):
    def fn(x):
        tokens = x.flatten(2).mT
        tokens = (tokens.unflatten(1, (3, 20)) * 2).flatten(1, 2)  # frame by frame, and back
        return attend(tokens.view(1, 1, 60, 16).reshape(1, 60, 16))

    assert grid(fn, (latents(),)) == ("3", "4", "5")


def test_one_latent_is_found_in_two_steps(grid):
    fn = lambda x: attend(x.flatten(3).permute(0, 2, 3, 1).reshape(1, 20, 16))  # noqa: E731
    assert grid(fn, (latents(1),)) == ("1", "4", "5")


ORDER = torch.randperm(60, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "put",
    [
        lambda h: h[:, ORDER],
        lambda h: h.index_select(1, ORDER),
        lambda h: h.gather(1, ORDER[None, :, None].expand_as(h)),
        lambda h: h.take_along_dim(ORDER[None, :, None], 1),
        lambda h: h.roll(7, 1),
        lambda h: torch.roll(h, 7, dims=(1,)),
        lambda h: h.flip(-2),
        lambda h: h.flip(1, 2),
        lambda h: torch.flip(h, (0, 1)),
        lambda h: h.sort(1)[0],
        lambda h: h.mT[..., ORDER].mT,
        lambda h: h.unflatten(1, (3, 20))[:, :, ORDER[:20] % 20].flatten(1, 2),
        lambda h: h.unflatten(1, (3, 4, 5)).roll((1, 2), (2, 3)).flatten(1, 3).roll(1, 1),
    ],
)
def test_tokens_in_another_order_than_the_grid(grid, put):
    assert grid(lambda x: attend(put(x.flatten(2).mT)), (latents(),)) == token_grid.REORDERED


@pytest.mark.parametrize(
    "put",
    [
        lambda h: h.flip(-1),
        lambda h: h.roll(8, -1),
        lambda h: h[..., torch.arange(16).flip(0)],
        lambda h: torch.randn(60, 16)[ORDER] + h,
        lambda h: h + h.roll(1, 1),
        lambda h: torch.stack([h, h])[0],
        lambda h: h[None, ..., :16][0, :, :],
    ],
)
def test_features_in_another_order_leave_tokens_where_they_are(grid, put):
    assert grid(lambda x: attend(put(x.flatten(2).mT)), (latents(),)) == ("3", "4", "5")


def test_latents_in_another_order_are_a_grid_all_the_same(grid):
    fn = lambda x: attend(x.roll(1, 3).flatten(2).mT)  # noqa: E731
    assert grid(fn, (latents(),)) == ("3", "4", "5")
