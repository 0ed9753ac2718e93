"""Block means: every form against the definition, and what a mean must satisfy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import NO_NATIVE

from lipass.kernels.plan import BlockGrid
from lipass.kernels.pool.api import pool_blocks

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(NO_NATIVE), reason=str(NO_NATIVE)))
FAST = ["vectorized", NATIVE]
PROVIDERS = ["reference", *FAST]
grids = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
tiles = st.sampled_from([(4, 4, 4), (1, 8, 8), (4, 8, 4), (2, 3, 5), (1, 1, 1)])


@pytest.mark.parametrize("provider", FAST)
@given(grids, tiles)
def test_fast_forms_equal_the_reference(provider, size, tile):
    grid = BlockGrid(size, tile)
    x = torch.randn(2, 1, grid.tokens, 3)
    expected = pool_blocks(x, grid, provider="reference")
    torch.testing.assert_close(pool_blocks(x, grid, provider=provider), expected)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", [(2, 22, 40), (3, 30, 52), (5, 45, 80), (1, 7, 9)])
def test_constant_input_gives_constant_means(provider, size):
    grid = BlockGrid(size, (4, 8, 4))
    means = pool_blocks(torch.full((1, 1, grid.tokens, 2), 1.7), grid, provider=provider)
    torch.testing.assert_close(means, torch.full((1, 1, grid.blocks, 2), 1.7))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(4, 8, 8), (3, 7, 9)])
def test_means_accumulate_in_fp32(provider, dtype, size):
    grid = BlockGrid(size, (4, 4, 4))
    x = torch.randn(1, 2, grid.tokens, 4).to(dtype)
    means = pool_blocks(x, grid, provider=provider)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, pool_blocks(x.double().float(), grid, provider="reference"))


@pytest.mark.parametrize("provider", FAST)
@pytest.mark.parametrize("size", [(4, 8, 8), (3, 7, 9)])
def test_strided_input_is_taken_as_it_is(provider, size):
    grid = BlockGrid(size, (2, 4, 4))
    x = torch.randn(2, grid.tokens, 3, 4).transpose(1, 2)
    for strided in (x, x.mT.contiguous().mT):
        torch.testing.assert_close(
            pool_blocks(strided, grid, provider=provider),
            pool_blocks(strided, grid, provider="reference"),
        )


@pytest.mark.parametrize("provider", FAST)
def test_empty_grid_gives_no_mean(provider):
    x = torch.zeros(1, 2, 0, 4)
    grid = BlockGrid((1, 1, 0), (1, 1, 8))
    assert pool_blocks(x, grid, provider=provider).shape == (1, 2, 0, 4)


def test_wrong_token_count_is_refused():
    with pytest.raises(ValueError, match="pass the tokens of one segment"):
        pool_blocks(torch.zeros(1, 1, 7, 4), BlockGrid((1, 2, 4), (1, 1, 1)))


def test_unknown_provider_is_refused():
    with pytest.raises(ValueError, match="cuda_graph"):
        pool_blocks(
            torch.zeros(1, 1, 1, 4), BlockGrid((1, 1, 1), (1, 1, 1)), provider="cuda_graph"
        )
