"""FlashAttention 4 as a provider: what it is told, by a stand-in that computes what it is told."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from kernel_cases import make_case, masked_dense

from lipass.kernels import chip, probe, registry
from lipass.kernels.block_sparse.kind import kind_of
from lipass.kernels.plan import BlockGrid

NAME = "lipass.kernels.block_sparse.fa4"


class Lists(NamedTuple):
    """As `BlockSparseTensorsTorch` of the package, but for what its backward reads."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


@pytest.fixture
def fa4(monkeypatch):
    """Import the provider over a stand-in of the package; `calls` are those of its function."""
    calls = []

    def flash_attn_func(
        q, k, v, qv=None, softmax_scale=None, mask_mod=None, block_sparse_tensors=None,
        return_lse=False,
    ):  # fmt: skip
        calls.append(block_sparse_tensors)
        lists = block_sparse_tensors
        assert lists.block_size == (128, 128)
        batch, queries, heads, _ = q.shape
        rows = (batch, heads, -(-queries // 128))
        for count, index in zip(lists[:4:2], lists[1:4:2], strict=True):
            assert (count.dtype, index.dtype) == (torch.int32, torch.int32)
            assert (count.shape, index.shape[:3]) == (rows, rows)
        assert int(lists.mask_block_cnt.sum()) == 0
        blocks = -(-k.shape[1] // 128)
        assert lists.full_block_idx.shape[3] == blocks
        seen = torch.zeros(*rows, blocks * 128, dtype=torch.bool)
        for at in torch.cartesian_prod(*map(torch.arange, rows)).tolist():
            listed = lists.full_block_idx[(*at, slice(lists.full_block_cnt[tuple(at)]))].tolist()
            assert len(set(listed)) == len(listed)
            for n, block in enumerate(listed):
                # Only in the last one of a list it hides keys behind the end.
                assert (block + 1) * 128 <= k.shape[1] or n == len(listed) - 1
                seen[(*at, slice(block * 128, block * 128 + 128))] = True
        mask = seen.repeat_interleave(128, 2)[:, :, :queries, : k.shape[1]]
        q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
        score = (q @ k.mT * softmax_scale).masked_fill(~mask, -torch.inf)
        out = (score.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2).contiguous()
        lse = score.logsumexp(-1).float() if return_lse else None
        return out.to(torch.float16), lse

    modules = {
        "flash_attn": {}, "flash_attn.cute": {},
        "flash_attn.cute.interface": {"flash_attn_func": flash_attn_func},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": Lists},
    }  # fmt: skip
    for name, members in modules.items():
        made = ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    module = importlib.import_module(NAME)
    monkeypatch.setattr(chip, "why_not", lambda device: None)
    monkeypatch.setattr(chip, "capability", lambda device: (9, 0))
    monkeypatch.setattr(probe, "_trusted", {"fa4"})
    registry.module_of.cache_clear()
    yield SimpleNamespace(module=module, calls=calls)
    sys.modules.pop(NAME, None)
    registry.module_of.cache_clear()


def in_runs(role, frames, text, size=(16, 8), **options):
    case = make_case(role, frames, size, text, (1, 16, 8), dtype=torch.float16, dim=64, **options)
    for n, part in enumerate(case.layout.segments):
        if part.role != "text":
            grid = BlockGrid(part.grid.grid, (1, 16, 8), in_order=True)
            case.layout = case.layout.replace_grid(n, grid)
    case.q_grid = case.layout.segments[-1].grid
    return case


CASES = {
    "decode, the text ends within a block": lambda: in_runs("decode", 4, 33, batch=2),
    "decode, the chunk does": lambda: in_runs("prefill", 3, 0, size=(9, 8)),
    "whole blocks": lambda: in_runs("prefill", 3, 128),
    "all text tokens but one": lambda: in_runs("prefill", 3, 127, heads=1),
}


@pytest.mark.parametrize("name", CASES)
def test_what_it_is_told_equals_masked_dense(name, fa4):
    case = CASES[name]()
    plan = case.plan()
    assert fa4.module.lay(case.q, case.keys, case.values, case.q_grid, case.layout, False) is None
    expected, log_sums = masked_dense(case, plan)
    joined = [torch.cat(case.keys, 2)], [torch.cat(case.values, 2)]
    for keys, values in ((case.keys, case.values), joined):
        out, lse = fa4.module.block_sparse_attention(
            case.q, keys, values, plan, scale=0.125, key_bias=None, return_lse=True
        )
        torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(lse.double(), log_sums, atol=1e-5, rtol=1e-5)
        assert out.transpose(1, 2).is_contiguous()
    out, lse = fa4.module.block_sparse_attention(
        case.q, case.keys, case.values, plan, scale=0.125, key_bias=None
    )
    assert lse is None
    assert len(fa4.calls) == 3


def test_rows_without_a_key_give_zero(fa4):
    case = in_runs("prefill", 2, 0, heads=1)
    plan = case.plan()
    plan = plan._replace(counts=torch.zeros_like(plan.counts))
    out, lse = fa4.module.block_sparse_attention(
        case.q, case.keys, case.values, plan, scale=0.125, key_bias=None, return_lse=True
    )
    assert not out.any()
    assert torch.isneginf(lse).all()


def test_rows_of_any_length_keep_what_they_list(fa4):
    case = in_runs("prefill", 3, 33, heads=1)
    plan = case.plan(latent_mask=torch.ones(1, 3, 3, dtype=torch.bool).tril())
    assert len(set(plan.counts.flatten().tolist())) > 1
    out, _ = fa4.module.block_sparse_attention(
        case.q, case.keys, case.values, plan, scale=0.125, key_bias=None
    )
    expected, _ = masked_dense(case, plan)
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)


def test_refusals_name_the_reason(fa4, monkeypatch):
    case = in_runs("prefill", 3, 33, heads=1)

    def refusal(**changes):
        kind = kind_of(case.q, case.q_grid, case.layout)
        return fa4.module.why_not(kind._replace(**changes))

    assert refusal() is None
    assert "bf16 and fp16, got torch.float32" in refusal(dtype=torch.float32)
    assert "head dims up to 128, multiples of 8, got 132" in refusal(dim=132)
    assert "blocks of 128, got 128 queries, 64 keys" in refusal(k_volume=64)
    assert "without its backward" in refusal(records=True)
    monkeypatch.setattr(probe, "_trusted", set())
    assert "not tried on this GPU yet" in refusal()
    monkeypatch.setattr(chip, "capability", lambda device: (10, 0))
    assert "on 9.0 only, got 10.0" in refusal()
    monkeypatch.setattr(fa4.module, "flash_attn_func", lambda q, k, v, return_lse: None)
    assert "takes softmax_scale, block_sparse_tensors; install a newer" in refusal()


def test_layouts_that_it_cannot_express_are_refused(fa4):
    def laid(case, biased=False):
        return fa4.module.lay(case.q, case.keys, case.values, case.q_grid, case.layout, biased)

    assert "no bias" in laid(in_runs("prefill", 3, 33), biased=True)
    tiles = make_case("prefill", 3, (16, 16), 0, (1, 16, 8), dim=64, dtype=torch.float16)
    assert "runs of tokens; sparse.tile_order" in laid(tiles)
    two = in_runs("prefill", 3, 33, size=(9, 8))
    assert "not whole in text and current" in laid(two)


def test_without_its_package_it_is_not_available():
    registry.module_of.cache_clear()
    found = registry.module_of("block_sparse", "fa4")
    if not isinstance(found, str):
        pytest.skip("flash_attn.cute is installed")
    assert "flash_attn" in found


def test_it_is_asked_by_nobody_who_has_not_measured_it():
    assert "fa4" in registry.contenders("block_sparse", torch.device("cuda"))
    assert all("fa4" not in names for names in registry._PROVIDERS.values())
