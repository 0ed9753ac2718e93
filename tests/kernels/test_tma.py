"""The kernel of TMA tiles without a GPU: interpreted, and compiled for the chips that have it."""

import functools

import pytest
import torch
from kernel_cases import make_case
from triton_cases import SHARED_KIB, compile_for, interpret, product_loops, stack_bytes

pytest.importorskip("triton", reason="needs Triton")

from lipass.kernels import chip
from lipass.kernels.block_sparse import tma
from lipass.kernels.block_sparse.kind import kind_of
from lipass.kernels.plan import BlockGrid, KvLayout

HY = ("text", "history", "current"), ((1, 1, 929), (8, 30, 52), (4, 30, 52)), (4, 8, 4)
FORCING = ("history", "current"), ((18, 30, 52), (3, 30, 52)), (1, 32, 4)


def test_interpreted_kernel_equals_masked_dense():
    interpret("interpret_tma.py", checks=14)


@functools.cache
def compiled(chip, roles, grids, tile, head_dim=128, dtype="bf16", shared=None, lse=False):
    layout = KvLayout.build(roles, grids, tile)
    q_grid = BlockGrid(grids[-1], tile)
    if shared is None:
        shared = tuple(n for n, role in enumerate(roles) if role != "history")
    made = tma.geometry(q_grid, layout, shared, torch.device("cpu"))
    tiles = {name: made.constants[f"{name[2].upper()}_TILE"] for name in
             ("k_a_desc", "v_a_desc", "k_b_desc", "v_b_desc", "k_c_desc", "v_c_desc")}  # fmt: skip
    tiles |= {"q_desc": tile, "out_desc": tile}
    types = {
        name: f"tensordesc<{dtype}[1, {t}, {y}, {x}, {head_dim}]>"
        for name, (t, y, x) in tiles.items()
    }
    types |= {"lse_ptr": "*fp32", "index_ptr": "*i32", "count_ptr": "*i32", "corner_ptr": "*i32"}
    constants = made.constants | {
        "D": head_dim, "FOLDS": (1,) * 7, "STAGES": tma.STAGES, "LSE": lse, "UPCAST": False,
    }  # fmt: skip
    volume = tile[0] * tile[1] * tile[2]
    return compile_for(chip, tma.tma_kernel, types, constants, num_warps=4 if volume == 64 else 8,
                       num_stages=tma.STAGES)  # fmt: skip


@pytest.mark.parametrize("call", [HY, FORCING], ids=["hy", "forcing"])
def test_inner_loop_on_hopper_is_lean(call):
    binary = compiled(90, *call)
    assert stack_bytes(binary) == 0  # registers spill to the stack
    loops = product_loops(binary)
    assert len(loops) == len(call[0])
    for instructions, products, loads in loops:
        assert instructions <= 530
        # 128 queries and 128 keys, of 128 numbers: 8 products of scores and 8 of values a warp.
        assert products == 16
        assert loads == 2


OTHERS = {
    "sm_90-D64-fp16-lse": (90, *HY, 64, "fp16", None, True),
    "sm_90-volume-64": (90, ("current",), ((20, 22, 40),), (1, 8, 8)),
    "sm_90-any-plan-lse": (90, *HY, 128, "bf16", (), True),
    "sm_100": (100, *HY),
}


@pytest.mark.parametrize("name", OTHERS)
def test_compiles_within_the_chip(name):
    binary = compiled(*OTHERS[name])
    assert binary.metadata.shared <= SHARED_KIB[OTHERS[name][0]] * 1024
    assert stack_bytes(binary) == 0
    ptx = binary.asm["ptx"]
    assert "cp.async.bulk.tensor.5d" in ptx
    assert "cp.async.cg" not in ptx  # no row is fetched by itself
    assert ("tcgen05.mma" if "100" in name else "wgmma.mma_async") in ptx


@pytest.fixture
def case(monkeypatch):
    """Return a call, as if its tensors were on a Hopper."""
    monkeypatch.setattr(chip, "why_not", lambda device: None)
    monkeypatch.setattr(chip, "capability", lambda device: (9, 0))
    return make_case("decode", 3, (4, 8), 5, (2, 4, 8), heads=2, dim=64, dtype=torch.bfloat16)


def refusal(case, **changes):
    kind = kind_of(case.q, case.q_grid, case.layout)._replace(**changes)
    return tma.why_not.__wrapped__(kind)


def laid(case, q=None, biased=False):
    q = case.q if q is None else q
    found = tma.lay(q, case.keys, case.values, case.q_grid, case.layout, biased)
    return found if isinstance(found, str) else None


def test_refusals_name_the_reason(case, monkeypatch):
    assert refusal(case) is None
    assert "bf16 and fp16, got torch.float32" in refusal(case, dtype=torch.float32)
    assert "head dims (64, 128), got 112" in refusal(case, dim=112)
    assert "got 256 queries, 64 keys" in refusal(case, q_volume=256)
    assert "has no backward" in refusal(case, records=True)
    monkeypatch.setattr(chip, "capability", lambda device: (8, 9))
    assert "compute capability 9 or 10, got (8, 9)" in refusal(case)


def test_what_descriptors_cannot_hold_is_refused(case):
    assert laid(case) is None
    assert "adds no bias" in laid(case, biased=True)
    by_token = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert laid(case, by_token) is None
    packed = torch.stack([by_token.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2)
    assert laid(case, packed) is None
    assert "strides" in laid(case, case.q.mT.contiguous().mT)  # numbers of a row lie apart
    assert "strides" in laid(case, torch.randn(1, 2, 64, 66).bfloat16()[..., :64])
    two = torch.randn(2, 1, 64, 64).bfloat16().expand(2, 2, 64, 64)
    assert "strides" in laid(case, two)  # heads that share a row
    odd = torch.randn(1 + 2 * 64 * 64).bfloat16()[1:].view(1, 2, 64, 64)
    assert "multiples of 16 bytes" in laid(case, odd)


def test_grids_beyond_the_table_are_refused():
    row = KvLayout.build(("text",), ((1, 1, 1 << 20),), (1, 1, 128))
    assert tma._unfit_grids(BlockGrid((1, 1, 128), (1, 1, 128)), row) is None
    wide = BlockGrid((1, 2, 4096), (1, 2, 64))
    assert "up to (1023, 1023, 2047), got (1, 2, 4096)" in tma._unfit_grids(wide, row)
