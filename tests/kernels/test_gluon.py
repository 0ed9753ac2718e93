"""The kernel whose warps specialise without a GPU: its steps on the host, its machine code."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import make_case, masked_dense
from triton_cases import SHARED_KIB, compile_for, machine_code, product_loops, stack_bytes

pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")

from gluon_stand_in import Kernel

from lipass.kernels import chip, probe, registry
from lipass.kernels.block_sparse import gluon, gluon_kernel, tma
from lipass.kernels.block_sparse.kind import kind_of
from lipass.kernels.plan import BlockGrid, KvLayout

HY = ("text", "history", "current"), ((1, 1, 929), (8, 30, 52), (4, 30, 52)), (4, 8, 4)
RUNS = ("history", "current"), ((1, 1, 12800), (1, 1, 6400)), (1, 1, 128)
half = functools.partial(make_case, dim=64, dtype=torch.float16)


def follow(case, plan=None, kernel=None, seed=0):
    """Attend as the kernel's code says, each program's parts in turns; compare."""
    plan = plan or case.plan()
    kernel = kernel or Kernel(gluon_kernel.gluon_kernel, gluon_kernel, seed)
    laid = gluon.lay(case.q, case.keys, case.values, plan.q_grid, plan.kv, False)
    assert isinstance(laid, tma.Laid), laid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon, "gluon_kernel", kernel)
        out, lse = gluon.block_sparse_attention(
            case.q, case.keys, case.values, plan, scale=case.options["scale"], key_bias=None,
            return_lse=True, laid=laid,
        )  # fmt: skip
    expected, log_sums = masked_dense(case, plan)
    tolerance = 2e-3 if out.dtype == torch.float16 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), log_sums, atol=1e-5, rtol=1e-5)
    assert kernel.programs == plan.q_grid.blocks * case.q.shape[0] * case.q.shape[1]


def by_token(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def with_layouts_of_their_own():
    case = half("decode", 2, (3, 5), 9, (2, 4, 4), new_frames=1, batch=2)
    case.q, case.keys[1] = by_token(case.q), by_token(case.keys[1])
    return case


def in_runs():
    case = half("decode", 2, (4, 4), 5, (2, 4, 4), heads=1)
    grids = [BlockGrid((1, 1, s.grid.tokens), (1, 1, 32)) for s in case.layout.segments]
    case.layout = KvLayout.build(
        ("text", "history", "current"), tuple(g.grid for g in grids), (1, 1, 32)
    )
    case.q_grid = grids[-1]
    return case


CASES = {
    "tails on every axis, two blocks of text": lambda: half(
        "decode", 3, (3, 5), 33, (2, 4, 4), new_frames=1
    ),
    "heads folded into the batch, and not": with_layouts_of_their_own,
    "prefill without text, whole tiles": lambda: half("prefill", 3, (4, 8), 0, (1, 4, 8), heads=1),
    "tiles larger than the grid": lambda: half("decode", 2, (2, 2), 0, (2, 4, 4), new_frames=1),
    "four buffers and more blocks": lambda: half("prefill", 9, (4, 8), 3, (1, 4, 8), heads=1,
                                                 budget=0.9),
    "two buffers and more blocks": lambda: make_case(
        "prefill", 5, (4, 8), 3, (1, 4, 8), heads=1, budget=0.9, dim=128, dtype=torch.bfloat16
    ),
    "runs of tokens": in_runs,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps_of_the_kernel_equal_masked_dense(name):
    torch.manual_seed(0)
    follow(CASES[name]())


def test_keys_in_one_tensor_are_cut_by_segment():
    case = half("decode", 2, (3, 5), 33, (2, 4, 4), heads=1, new_frames=1)
    plan = case.plan()
    case.keys, case.values = ([by_token(torch.cat(x, 2))] for x in (case.keys, case.values))
    follow(case, plan)


def test_rows_of_any_length_are_split_among_the_segments():
    case = half("decode", 130, (1, 4), 5, (1, 1, 4), heads=1, new_frames=1, budget=0.9)
    follow(case, case.plan()._replace(shared_segments=()))
    case = half("prefill", 3, (4, 8), 33, (1, 4, 8), heads=1, budget=0.5)
    causal = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    follow(case, case.plan(latent_mask=causal))


def test_rows_without_a_key_give_zero():
    case = half("decode", 3, (4, 4), 5, (2, 4, 4), heads=1)
    plan = case.plan()
    follow(case, plan._replace(counts=torch.zeros_like(plan.counts), shared_segments=()))


@pytest.mark.parametrize("seed", range(5))
def test_whoever_goes_first_the_result_is_the_same(seed):
    follow(half("prefill", 7, (2, 8), 0, (1, 2, 8), heads=1, budget=0.9), seed=seed)


FAULTS = {
    "no wait for a free buffer": ("mbarrier.wait(k_empty.index(stage), free)", ""),
    "values fetched into the wrong phase": (
        "mbarrier.wait(v_empty.index(stage), free)",
        "mbarrier.wait(v_empty.index(stage), free ^ 1)",
    ),
    "values not waited for": (
        "mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)",
        "",
    ),
    "values given back before their product is done": (
        "            acc, weight = warpgroup_mma_wait(0, deps=[product, weight])\n"
        "            mbarrier.arrive(v_empty.index(before), count=1)\n",
        "            mbarrier.arrive(v_empty.index(before), count=1)\n"
        "            acc, weight = warpgroup_mma_wait(0, deps=[product, weight])\n",
    ),
    "values never given back": ("mbarrier.arrive(v_empty.index(before), count=1)", ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_protocol_would_be_seen(name, tmp_path):
    source = Path(gluon_kernel.__file__).read_text()
    right, wrong = FAULTS[name]
    assert source.count(right) == 1
    (file := tmp_path / "faulty_kernel.py").write_text(source.replace(right, wrong or "pass"))
    spec = importlib.util.spec_from_file_location("faulty_kernel", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    case = half("prefill", 9, (2, 8), 0, (1, 2, 8), heads=1, budget=0.9, dim=128)
    kernel = Kernel(module.gluon_kernel, module)
    with pytest.raises(AssertionError, match=r"nobody can go on|product|not close|have arrived"):
        follow(case, kernel=kernel)


@given(
    st.tuples(*[st.integers(0, 9)] * 3),
    st.sampled_from([(4, 8, 4), (1, 32, 4), (2, 4, 16), (128, 1, 1), (1, 1, 128)]),
    st.integers(0, 300),
)
def test_tables_name_the_token_of_each_slot(size, tile, text):
    layout = KvLayout.build(("text", "current"), ((1, 1, text), size), tile)
    corners = tma.geometry(BlockGrid(size, tile), layout, (), torch.device("cpu")).corners
    extents = gluon.extents(layout, torch.device("cpu"))
    found = []
    for number, part in enumerate(layout.segments):
        (_, y, x), slot = tile, torch.arange(128)
        for block in layout.block_range(number):
            extent = int(extents[block])
            exists = torch.ones(128, dtype=torch.bool)
            if extent:
                exists = (slot // (y * x) < (extent & 0xFF)) & (slot % x < (extent >> 16 & 0xFF))
                exists &= (slot // x % y < (extent >> 8 & 0xFF)) & (slot < extent >> 24)
            if part.grid.is_row:
                token = (block - layout.block_range(number).start) * 128 + slot
            else:
                at = int(corners[block])
                at_t, at_y = (at >> 21) + slot // (y * x), (at >> 11 & 0x3FF) + slot // x % y
                token = (at_t * part.grid.grid[1] + at_y) * part.grid.grid[2]
                token += (at & 0x7FF) + slot % x
            found.append(torch.where(exists, token + layout.token_range(number).start, -1))
    expected = layout.token_index()
    torch.testing.assert_close(torch.stack(found) if found else expected, expected)


@functools.cache
def compiled(roles, grids, tile, head_dim=128, dtype="bf16", shared=None, lse=False):
    layout, q_grid = KvLayout.build(roles, grids, tile), BlockGrid(grids[-1], tile)
    if shared is None:
        shared = tuple(n for n, role in enumerate(roles) if role != "history")
    made = tma.geometry(q_grid, layout, shared, torch.device("cpu")).constants
    constants = made | gluon.constants(q_grid, layout) | {
        "D": head_dim, "FOLDS": (1,) * 7, "STAGES": gluon.stages(head_dim), "LSE": lse,
    }  # fmt: skip
    tiles = {f"{x}_{n}_desc": made[f"{n.upper()}_TILE"] for n in "abc" for x in "kv"}
    tiles |= dict.fromkeys(("q_desc", "out_desc"), constants["HALF"])
    types = {
        name: f"tensordesc<{dtype}[1, {t}, {y}, {x}, {head_dim}],{gluon._BOX!r}>"
        for name, (t, y, x) in tiles.items()
    }
    types |= {"lse_ptr": "*fp32"}
    types |= {f"{name}_ptr": "*i32" for name in ("index", "count", "corner", "extent")}
    return compile_for(90, gluon_kernel.gluon_kernel, types, constants, num_warps=4)


COMPILED = {
    "hy": HY,
    "whole-runs": RUNS,
    "D64-fp16-lse": (*HY, 64, "fp16", None, True),
    "any-plan-lse": (*HY, 128, "bf16", (), True),
}


@pytest.mark.parametrize("name", COMPILED)
def test_machine_code_is_lean_and_fits_the_chip(name):
    call = COMPILED[name]
    binary = compiled(*call)
    assert binary.metadata.shared <= SHARED_KIB[90] * 1024
    assert stack_bytes(binary) == 0  # no register is spilled, around the loops neither
    # Registers of a thread: the groups that multiply, and the warp that loads.
    ptx = binary.asm["ptx"]
    assert set(re.findall(r"setmaxnreg\.dec\S+\s+(\d+)", ptx)) >= {"240", "24"}
    assert "cp.async.cg" not in ptx
    dim = call[3] if len(call) > 3 else 128
    loops = product_loops(binary)
    assert len(loops) == 2  # one for each group of 64 queries
    for instructions, products, loads in loops:
        # 64 queries and 128 keys: 4 or 8 products of scores, 8 of values; nobody loads here.
        assert products == dim // 16 + 8
        assert loads == 0
        # Two versions of the compiler are in use: 460 at most by one, 478 by the other.
        assert instructions <= 480


def test_softmax_runs_beside_the_product_of_values():
    """The assembler once moved the wait for that product in front of the exponentials."""
    code = machine_code(compiled(*HY))
    waits = [n for n, line in enumerate(code) if "WARPGROUP.DEPBAR" in line]
    exponents = [sum("MUFU.EX2" in line for line in code[a:b]) for a, b in zip(waits, waits[1:])]  # noqa: B905,RUF007
    # Of 128 keys a thread has 2 rows of 32, and 2 numbers by which its sums shrink.
    assert exponents.count(66) == 2


def test_one_warp_loads_two_halves_of_a_row_of_each_tile():
    code = machine_code(compiled(*HY))
    # Queries, then keys and values of three segments: 128 numbers are two boxes of 64.
    assert sum("UTMALDG.5D" in line for line in code) == 2 * (2 + 2 * 3)
    assert sum("UTMASTG.5D" in line for line in code) == 2


@pytest.fixture
def case(monkeypatch):
    """Return a call, as if its tensors were on a Hopper where a probe has passed."""
    monkeypatch.setattr(chip, "why_not", lambda device: None)
    monkeypatch.setattr(chip, "capability", lambda device: (9, 0))
    monkeypatch.setattr(probe, "_trusted", {"gluon"})
    return make_case("decode", 3, (4, 8), 5, (4, 8, 4), heads=2, dim=64, dtype=torch.bfloat16)


def refusal(case, **changes):
    gluon.unfit.cache_clear()
    try:
        return gluon.why_not(kind_of(case.q, case.q_grid, case.layout)._replace(**changes))
    finally:
        gluon.unfit.cache_clear()


def test_refusals_name_the_reason(case, monkeypatch):
    assert refusal(case) is None
    assert "bf16 and fp16, got torch.float32" in refusal(case, dtype=torch.float32)
    assert "head dims (64, 128), got 112" in refusal(case, dim=112)
    assert "tiles of 128 slots, got 64 queries, 128 keys" in refusal(case, q_volume=64)
    assert "has no backward" in refusal(case, records=True)
    monkeypatch.setattr(probe, "_trusted", set())
    assert "not tried on this GPU yet" in refusal(case)
    monkeypatch.setattr(chip, "capability", lambda device: (10, 0))
    assert "compute capability 9.0, got 10.0" in refusal(case)


def test_what_descriptors_cannot_hold_is_refused(case):
    def laid(q=case.q, q_grid=case.q_grid, layout=case.layout, biased=False):
        found = gluon.lay(q, case.keys, case.values, q_grid, layout, biased)
        return found if isinstance(found, str) else None

    assert laid() is None
    assert "adds no bias" in laid(biased=True)
    assert "strides" in laid(case.q.mT.contiguous().mT)
    other = case.layout.replace_grid(1, BlockGrid((3, 4, 8), (1, 32, 4)))
    assert "one tile for all segments but rows" in laid(layout=other)


def test_it_is_asked_by_nobody_who_has_not_measured_it():
    names = {name for names in registry._PROVIDERS.values() for name in names}
    assert "gluon" not in names
    assert "gluon" in registry.contenders("block_sparse", torch.device("cuda"))
    assert registry.contenders("block_sparse", torch.device("cpu")) == ()
