"""Compare the Triton kernels with the references under the interpreter; run by test_triton.py.

A process of its own, because TRITON_INTERPRET must be set before Triton is first imported. The
interpreter takes some 0.1 s per program, hence few and small grids.
"""

import os

import torch
from kernel_cases import make_case, masked_dense

from lipass.kernels.block_sparse.api import block_sparse_attention
from lipass.kernels.nearest.basis import basis_of
from lipass.kernels.nearest.order import sort_keys
from lipass.kernels.nearest.plan import Buckets, in_rows, plan_in_order

assert os.environ["TRITON_INTERPRET"] == "1"
torch.manual_seed(0)


def check(label, case, plan, *, bias=None, tolerance=1e-5):
    """Compare output and log-sum-exp with masked dense attention."""
    out, lse = block_sparse_attention(
        case.q, case.keys, case.values, plan, scale=case.options["scale"], key_bias=bias,
        return_lse=True, provider="triton",
    )  # fmt: skip
    expected, expected_lse = masked_dense(case, plan, bias)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)
    assert out.dtype == case.q.dtype
    print("ok", label)


case = make_case("decode", 3, (4, 8), 5, (2, 4, 4), heads=1, dim=16)
check("decode, text tail", case, case.plan())

case = make_case("decode", 3, (3, 5), 33, (2, 4, 4), heads=1, dim=16, new_frames=1)
check("tails on every axis, two blocks of text", case, case.plan())

case = make_case("prefill", 3, (4, 8), 0, (1, 4, 8), heads=2, dim=24, budget=0.1)
check("prefill without text, head dim padded, heads apart", case, case.plan())

case = make_case("decode", 2, (4, 8), 3, (1, 4, 8), q_tile=(2, 4, 8), heads=1, dim=16)
check("query tile of its own", case, case.plan())

keep = torch.tensor([[True, False, True], [False, False, True]])
case = make_case("decode", 3, (4, 4), 3, (2, 4, 4), keep_frames=keep, batch=2, heads=1, dim=16)
bias = torch.randn(2, case.layout.tokens)
check("dropped frames in mixed tiles, ragged counts, bias per item", case, case.plan(), bias=bias)
check("one bias for all items", case, case.plan(), bias=bias[:1])

case = make_case("decode", 2, (4, 4), 3, (2, 4, 4), batch=2, heads=2, dim=16, new_frames=1)
bias = torch.randn(2, 2, case.layout.tokens)
check("bias per item and head", case, case.plan(), bias=bias)
bias[:, 1, 3:19] = -torch.inf
check("bias per head that masks keys", case, case.plan(), bias=bias[:1])
case.q, bias = case.q.half(), bias[1:]
case.keys, case.values = ([part.half() for part in parts] for parts in (case.keys, case.values))
check("bias per head in fp16", case, case.plan(), bias=bias, tolerance=2e-3)

case = make_case("prefill", 3, (4, 8), 3, (1, 4, 8), heads=1, dim=16, budget=0.5)
causal = torch.ones(1, 3, 3, dtype=torch.bool).tril()
check("latents that see those in front of them", case, case.plan(latent_mask=causal))

case = make_case("decode", 2, (4, 4), 0, (2, 4, 4), heads=1, dim=16)
plan = case.plan()
none = plan._replace(counts=torch.zeros_like(plan.counts), shared_segments=())
check("rows without a key", case, none)

case = make_case("decode", 8, (8, 8), 9, (4, 8, 8), heads=1, dim=16, new_frames=4, sink_latents=0)
check("tile of 256 in parts", case, case.plan())

case = make_case("decode", 3, (4, 8), 3, (1, 4, 8), heads=2, dim=16, new_frames=1)
basis = basis_of(case.keys[1], 4, 0, 32)
buckets = Buckets(sort_keys(case.keys[1], basis, 32, 32), basis)
plan = plan_in_order(
    case.q,
    case.keys,
    *in_rows(case.layout, case.q_grid),
    buckets,
    budget=0.3,
    scale=0.25,
    first=32,
)
check("sorted keys and queries", case, plan, bias=torch.randn(1, 2, case.layout.tokens))

case = make_case("decode", 2, (4, 8), 3, (1, 4, 8), heads=1, dim=64)
case.q, case.keys, case.values = (
    case.q.transpose(1, 2).contiguous().transpose(1, 2),
    [k.transpose(1, 2).contiguous().transpose(1, 2) for k in case.keys],
    [v.mT.contiguous().mT for v in case.values],
)
check("strided", case, case.plan())

case.keys[1], case.values[2] = case.keys[1].contiguous(), case.values[2].contiguous()
check("each segment with strides of its own", case, case.plan())
plan = case.plan()
case.keys, case.values = [torch.cat(case.keys, 2)], [torch.cat(case.values, 2)]
check("keys in one tensor", case, plan)

# Rounding of the output, and of the weights before they meet the values.
for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
    case = make_case("decode", 2, (4, 8), 3, (1, 4, 8), heads=1, dim=64, dtype=dtype)
    check(str(dtype), case, case.plan(), tolerance=tolerance)
