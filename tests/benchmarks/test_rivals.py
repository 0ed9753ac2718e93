"""Rivals that only a GPU has are tried against stand-ins of the same signature."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from benchmarks.rivals import flashinfer, flex, rivals, sparge
from lipass.kernels import BlockGrid, KvLayout, plan_attention

SCALE = 0.25


@pytest.fixture
def call():
    """Return q, k, v and a plan over a history of `grid` and four latents."""

    def make(grid, tile):
        layout = KvLayout.build(("history", "current"), (grid, (4, *grid[1:])), tile)
        q_grid = BlockGrid((4, *grid[1:]), tile)
        q, k, v = (torch.randn(2, 3, n, 16) for n in (q_grid.tokens, *(layout.tokens,) * 2))
        keys = list(k.split([part.grid.tokens for part in layout.segments], 2))
        plan = plan_attention(
            q, keys, layout, q_grid, budget=0.4, scale=SCALE, role="decode", sink_latents=0
        )
        return q, k, v, plan

    return make


def expected(q, k, v, plan):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.to_dense_mask(), scale=SCALE)


def in_tiles(x, grid):
    order = grid.token_index().flatten()
    return x[:, :, order[order >= 0]]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_those_of_a_cpu_attend_to_the_blocks_of_the_plan(call):
    q, k, v, plan = call((6, 4, 4), (1, 4, 4))
    found = rivals(q, k, v, SCALE)
    assert list(found) == ["mask", "flex", "gather"]
    for name in ("mask", "gather"):
        torch.testing.assert_close(found[name](plan)(), expected(q, k, v, plan))


class Wrapper:
    """Variable block-sparse attention by its definition."""

    def __init__(self, float_workspace_buffer, backend="auto"):
        assert float_workspace_buffer.dtype == torch.uint8

    def plan(
        self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim,
        causal=False, sm_scale=None, q_data_type="float16", **_,
    ):  # fmt: skip
        assert block_mask_map.shape == (num_kv_heads, block_row_sz.shape[1], block_col_sz.shape[1])
        rows = torch.arange(block_row_sz.shape[1]).repeat_interleave(block_row_sz[0])
        columns = torch.arange(block_col_sz.shape[1]).repeat_interleave(block_col_sz[0])
        self.mask, self.scale = block_mask_map[:, rows][:, :, columns], sm_scale

    def run(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=self.scale)


@pytest.mark.parametrize("grid", [(6, 4, 4), (5, 3, 5)])
def test_flashinfer_is_given_the_plan(call, grid, monkeypatch):
    module = ModuleType("flashinfer.sparse")
    module.VariableBlockSparseAttentionWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.sparse", module)
    q, k, v, plan = call(grid, (1, 2, 4))
    out = flashinfer(q, k, v, SCALE, plan)()
    wanted = in_tiles(expected(q, k, v, plan), plan.q_grid)
    torch.testing.assert_close(out.unflatten(0, (2, 3)), wanted)


def block_sparse_sage2_attn_cuda(q, k, v, mask_id=None):
    mask = mask_id.bool().repeat_interleave(128, 2).repeat_interleave(64, 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_sparge_is_given_the_plan(call, monkeypatch):
    module = ModuleType("spas_sage_attn")
    module.block_sparse_sage2_attn_cuda = block_sparse_sage2_attn_cuda
    monkeypatch.setitem(sys.modules, "spas_sage_attn", module)
    q, k, v, plan = call((6, 8, 8), (2, 8, 8))
    wanted = in_tiles(expected(q, k, v, plan), plan.q_grid)
    torch.testing.assert_close(sparge(q, k, v, plan)(), wanted)
    q, k, v, plan = call((6, 4, 4), (1, 4, 4))
    with pytest.raises(ValueError, match="whole blocks of 128 tokens, got \\(16, 16\\)"):
        sparge(q, k, v, plan)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("grid", [(6, 4, 4), (5, 3, 5)])
def test_flex_is_given_the_plan_in_the_order_of_its_tiles(call, grid, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k, v, plan = call(grid, (1, 2, 4))
    out = flex(q, k, v, SCALE, plan)()
    slots = plan.q_grid.token_index().flatten()
    wanted = expected(q, k, v, plan)[:, :, slots[slots >= 0]]
    torch.testing.assert_close(out[:, :, slots >= 0], wanted)
