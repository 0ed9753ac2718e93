"""Pooling and selection in Triton without a GPU: interpreted, and compiled for six chips."""

import inspect
import re

import pytest
import torch
from kernel_cases import make_case
from triton_cases import SHARED_KIB, compile_for, interpret, stack_bytes

from lipass.kernels import chip, pool_blocks, registry

triton = pytest.importorskip("triton", reason="needs Triton")

from lipass.kernels.pool import triton as pool  # noqa: E402
from lipass.kernels.select import triton as select  # noqa: E402

TILE = (4, 8, 4)


def test_interpreted_kernels_equal_references():
    interpret("interpret_triton_planning.py", checks=33)


@pytest.mark.parametrize("chip", SHARED_KIB)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "tile"),
    [("bf16", 128, TILE), ("fp16", 80, (3, 5, 7)), ("fp32", 64, TILE)],
)
def test_pooling_compiles_within_the_chip(chip, dtype, head_dim, tile):
    block_d = triton.next_power_of_2(head_dim)
    slots = pool.slots_at_once(tile[0] * tile[1] * tile[2], block_d)
    binary = compile_for(
        chip, pool.pool_kernel, {"x_ptr": f"*{dtype}", "mean_ptr": "*fp32"},
        {"x_stride_d": 1, "D": head_dim, "BLOCK_D": block_d, "SLOTS": slots, "TILE": tile},
        r"x_stride_[bhl]", num_warps=pool.WARPS,
    )  # fmt: skip
    assert binary.metadata.shared <= SHARED_KIB[chip] * 1024
    assert stack_bytes(binary) == 0
    # Tokens are read 16 bytes at a time.
    assert set(re.findall(r"ld\.global[.\w]*", binary.asm["ptx"])) == {"ld.global.v4.b32"}


@pytest.mark.parametrize("chip", SHARED_KIB)
@pytest.mark.parametrize(("head_dim", "protected"), [(64, False), (96, True), (128, True)])
def test_selection_compiles_within_the_chip(chip, head_dim, protected):
    pointers = {"q_ptr": "*fp32", "k_ptr": "*fp32", "protected_ptr": "*i1"}
    pointers |= {f"{name}_ptr": "*i32" for name in ("order", "index")}
    binary = compile_for(
        chip, select.select_kernel, pointers,
        {
            "D": head_dim, "PROTECTED": protected, "ROWS": select.ROWS,
            "COLUMNS": select.COLUMNS, "DEPTH": select.DEPTH, "SCAN": select.SCAN,
        },
        num_warps=select.WARPS,
    )  # fmt: skip
    assert binary.metadata.shared <= SHARED_KIB[chip] * 1024
    assert stack_bytes(binary) == 0


def test_pooling_refusals_name_the_reason(monkeypatch):
    case = make_case("decode", 2, (4, 4), 3, (1, 4, 4))
    assert pool.why_not(case.q, case.q_grid) == "runs on CUDA tensors, got cpu"
    # As if the tensors were on a GPU.
    monkeypatch.setattr(chip, "why_not", lambda device: None)
    assert pool.why_not(case.q, case.q_grid) is None
    assert "got torch.float64" in pool.why_not(case.q.double(), case.q_grid)
    assert "has no backward" in pool.why_not(case.q.requires_grad_(), case.q_grid)
    with torch.no_grad():
        assert pool.why_not(case.q, case.q_grid) is None


def test_selection_refusals_name_the_reason(monkeypatch):
    q_mean, k_mean, keep = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), torch.ones(1, 3) > 0
    assert select.why_not(q_mean, k_mean, None) == "runs on CUDA tensors, got cpu"
    monkeypatch.setattr(chip, "why_not", lambda device: None)
    assert select.why_not(q_mean, k_mean, None) is None
    assert "got torch.float32 and torch.float64" in select.why_not(q_mean, k_mean.double(), None)
    assert "dropped frames" in select.why_not(q_mean, k_mean, keep)


def test_what_is_refused_on_a_gpu_runs_with_whole_tensors():
    x, grid = torch.zeros(1, 1, 4, 4), make_case("decode", 1, (2, 2), 0, (1, 2, 2)).q_grid
    asked = {"pool": (x, grid), "select": (x, x, None)}
    for operation, arguments in asked.items():
        chosen = registry.choose(
            operation, torch.device("cuda"), None, lambda module, a=arguments: module.why_not(*a)
        )
        assert chosen.name == "vectorized"
        assert chosen.refusals == [("triton", "runs on CUDA tensors, got cpu")]


def test_nothing_is_read_back():
    for module in (pool, select):
        for read in (".item(", ".cpu(", ".tolist("):
            assert read not in inspect.getsource(module)


def on_gpu(case):
    case.q, case.keys = case.q.cuda(), [k.cuda() for k in case.keys]
    return case


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [(4, 16, 16), (5, 30, 52), (3, 7, 9)])
def test_means_on_a_gpu_equal_the_reference(size, dtype):
    grid = make_case("prefill", size[0], size[1:], 0, TILE).q_grid
    x = torch.randn(2, grid.tokens, 3, 96, device="cuda", dtype=dtype).transpose(1, 2)
    found, expected = (pool_blocks(x, grid, provider=name) for name in ("triton", "reference"))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("size", [(8, 8), (30, 52), (7, 9)])
def test_plan_on_a_gpu_equals_that_on_a_cpu(role, size):
    case = make_case(role, 20, size, 33, TILE, dim=64, budget=0.2, batch=2, new_frames=4)
    expected, found = case.plan(), on_gpu(case).plan()
    torch.testing.assert_close(found.indices.cpu(), expected.indices, atol=0, rtol=0)
    torch.testing.assert_close(found.counts.cpu(), expected.counts, atol=0, rtol=0)


@pytest.mark.needs_gpu
def test_plan_takes_three_launches():
    from torch.profiler import ProfilerActivity, profile

    case = on_gpu(make_case("decode", 20, (30, 52), 929, TILE, dim=128, dtype=torch.bfloat16))
    # What poisons memory for the other tests would launch fills.
    torch.use_deterministic_algorithms(False)
    case.plan()  # compiles, and tables that follow from shapes alone are moved
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        case.plan()
        torch.cuda.synchronize()
    launches = [event.name for event in profiler.events() if event.device_type.name == "CUDA"]
    assert len(launches) <= 3, launches
