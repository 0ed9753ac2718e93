"""Compare the kernel of TMA tiles with masked dense attention under the interpreter.

Run by test_tma.py in a process of its own, as TRITON_INTERPRET must be set before Triton is first
imported.
"""

import os

import torch
from kernel_cases import make_case, masked_dense

from lipass.kernels.block_sparse import tma
from lipass.kernels.plan import BlockGrid, KvLayout

assert os.environ["TRITON_INTERPRET"] == "1"
# Fills `torch.empty`, so that unwritten output is seen.
torch.use_deterministic_algorithms(True)
torch.manual_seed(0)


def check(label, case, plan=None, *, tolerance=1e-5):
    plan = plan or case.plan()
    laid = tma.lay(case.q, case.keys, case.values, plan.q_grid, plan.kv, False)
    assert isinstance(laid, tma.Laid), laid
    out, lse = tma.block_sparse_attention(
        case.q, case.keys, case.values, plan, scale=case.options["scale"], key_bias=None,
        return_lse=True, laid=laid,
    )  # fmt: skip
    expected, expected_lse = masked_dense(case, plan)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)
    assert out.dtype == case.q.dtype
    print("ok", label, flush=True)


def by_token(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


check("decode, text tail", make_case("decode", 3, (4, 8), 5, (2, 4, 4), heads=1, dim=16))
case = make_case("decode", 3, (3, 5), 33, (2, 4, 4), heads=2, dim=16, new_frames=1, batch=2)
check("tails on every axis, two blocks of text, heads folded into the batch", case)
case.q, case.keys[1], case.values[2] = by_token(case.q), by_token(case.keys[1]), case.values[2]
check("tensors with layouts of their own", case)
plan = case.plan()
parts = case.keys, case.values
case.keys, case.values = ([by_token(torch.cat(x, 2))] for x in parts)
check("keys in one tensor", case, plan)

check("prefill without text", make_case("prefill", 3, (4, 8), 0, (1, 4, 8), dim=16, budget=0.1))
case = make_case("prefill", 4, (4, 6), 7, (2, 4, 4), heads=1, dim=32, budget=0.3)
check("prefill with text, x tail", case)
case = make_case(
    "decode", 2, (8, 8), 9, (2, 4, 4), q_tile=(4, 4, 4), heads=1, dim=16, new_frames=4
)
check("query tile of its own", case)
case = make_case("decode", 2, (2, 2), 0, (2, 4, 4), heads=1, dim=16, new_frames=1)
check("tiles larger than the grid", case)

case = make_case("prefill", 3, (4, 8), 33, (1, 4, 8), heads=2, dim=16, budget=0.5)
causal = torch.ones(1, 3, 3, dtype=torch.bool).tril()
check(
    "rows of any length: which segments are whole is not known",
    case,
    case.plan(latent_mask=causal),
)
case = make_case("decode", 3, (4, 4), 5, (2, 4, 4), heads=1, dim=16)
plan = case.plan()
check("no segment known to be whole", case, plan._replace(shared_segments=()))
none = plan._replace(counts=torch.zeros_like(plan.counts), shared_segments=())
check("rows without a key", case, none)

case = make_case("decode", 130, (1, 4), 5, (1, 1, 4), heads=1, dim=16, new_frames=1, budget=0.9)
check("more ids than are counted at once", case, case.plan()._replace(shared_segments=()))

case = make_case("decode", 2, (4, 4), 5, (2, 4, 4), heads=2, dim=16)
grids = [BlockGrid((1, 1, s.grid.tokens), (1, 1, 32)) for s in case.layout.segments]
case.layout = KvLayout.build(
    ("text", "history", "current"), tuple(g.grid for g in grids), (1, 1, 32)
)
case.q_grid = grids[-1]
check("runs of tokens", case)

case = make_case("decode", 2, (4, 8), 3, (1, 4, 8), heads=1, dim=64, dtype=torch.float16)
check("fp16", case, tolerance=2e-3)
