"""The Triton kernel without a GPU: interpreted, and compiled ahead of time for six chips."""

import functools

import pytest
import torch
from triton_cases import SHARED_KIB, compile_for, interpret, stack_bytes

from lipass.kernels.plan import KvLayout

pytest.importorskip("triton", reason="needs Triton")

# The tensor core instruction that must appear.
INSTRUCTIONS = {
    80: "mma.sync",
    86: "mma.sync",
    89: "mma.sync",
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
    120: "mma.sync",
}
TILE = (4, 8, 4)


def test_interpreted_kernel_equals_reference():
    interpret("interpret_triton.py", checks=18)


@functools.cache
def compiled(chip, head_dim, tails, bias, dtype="bf16", tile=TILE):
    import triton

    from lipass.kernels.block_sparse import triton as provider

    kernel = provider.block_sparse_kernel
    grids = (1, 1, 929), (8, 30, 52), (4, 30, 52)
    layout = KvLayout.build(("text", "history", "current"), grids, tile)
    volume = tile[0] * tile[1] * tile[2]
    launch = provider.launch_options(volume, volume, chip // 10)
    pointers = {p.name: f"*{dtype}" for p in kernel.params if p.name.endswith("_ptr")}
    pointers |= {"index_ptr": "*i32", "count_ptr": "*i32", "bias_ptr": "*fp32", "lse_ptr": "*fp32"}
    constants = {
        "D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim),
        "ROWS": launch.rows, "COLUMNS": launch.columns, "Q_TILE": tile,
        "TAILS": tails, "BIAS": bias, "LSE": bias, "UPCAST": False,
    } | provider.segment_constants(layout, (0, 2))  # fmt: skip
    return compile_for(
        chip, kernel, pointers, constants, r"(q|[kv]_[abc])_stride_[bhl]",
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


CASES = [
    pytest.param(chip, *shape, id=f"sm_{chip}-{name}")
    for chip in SHARED_KIB
    for name, shape in {"D128-tails": (128, True, False), "D96-bias": (96, True, True)}.items()
] + [pytest.param(90, 64, False, False, id="sm_90-D64")]


@pytest.mark.parametrize(("chip", "head_dim", "tails", "bias"), CASES)
def test_compiles_within_the_chip(chip, head_dim, tails, bias):
    binary = compiled(chip, head_dim, tails, bias)
    assert binary.metadata.shared <= SHARED_KIB[chip] * 1024
    ptx = binary.asm["ptx"]
    assert INSTRUCTIONS[chip] in ptx
    assert "cp.async" in ptx  # keys and values are fetched ahead
    assert stack_bytes(binary) == 0  # registers spill to the stack


@pytest.mark.parametrize("tile", [(2, 4, 4), (1, 8, 8), (4, 8, 8), (64, 1, 1)])
def test_every_tile_volume_compiles(tile):
    binary = compiled(90, 64, True, False, "fp16", tile)
    assert binary.metadata.shared <= 227 * 1024


def test_refusals_name_the_reason():
    from kernel_cases import make_case

    from lipass.kernels.block_sparse import triton as provider
    from lipass.kernels.block_sparse.kind import kind_of

    case = make_case("decode", 2, (4, 4), 3, (1, 4, 4))
    kind = kind_of(case.q, case.q_grid, case.layout)
    assert provider.why_not(kind) == "runs on CUDA tensors, got cpu"


@pytest.mark.needs_gpu
@pytest.mark.parametrize("size", [(8, 8), (30, 52), (7, 9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_on_a_gpu_equals_masked_dense(size, dtype):
    from kernel_cases import make_case, masked_dense

    from lipass.kernels.block_sparse.api import block_sparse_attention

    case = make_case("decode", 4, size, 33, TILE, dim=64, dtype=dtype)
    case.q = case.q.cuda()
    case.keys, case.values = ([x.cuda() for x in part] for part in (case.keys, case.values))
    plan = case.plan()
    out = block_sparse_attention(case.q, case.keys, case.values, plan, provider="triton")
    expected = masked_dense(case, plan)[0]
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.needs_gpu
def test_call_reads_nothing_back_so_that_a_cuda_graph_can_hold_it():
    import lipass.kernels.ops  # noqa: F401
    from lipass.kernels import registry

    grids = ((1, 1, 33), (8, 16, 16), (4, 16, 16))
    tokens = [t * y * x for t, y, x in grids]
    draw = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(1, 4, tokens[-1], 64, **draw)
    keys, values = ([torch.randn(1, 4, n, 64, **draw) for n in tokens] for _ in range(2))
    flat = [n for grid in grids for n in grid]

    def call():
        return torch.ops.lipass.sparse_attention(
            q, keys, values, list(grids[-1]), flat, "text,history,current", list(TILE),
            0.3, 0.125, 1, "decode", None, "captured",
        )  # fmt: skip

    with registry.force("sparse"), torch.inference_mode():
        expected = call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
