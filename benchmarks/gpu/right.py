"""Compare one kernel with attention in fp64, call after call: is it right, and is it always so?

`python -m benchmarks.gpu.right tma --out FILE`; other names are triton, gluon, fa4, planning and
operator. Gluon and fa4 are tried in a process of their own first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import lipass.kernels.ops  # noqa: F401
from benchmarks.gpu.part import Part
from benchmarks.gpu.problem import NONE, Problem
from lipass.kernels import block_sparse_attention, pool_blocks, probe, registry, select_blocks
from lipass.kernels.block_sparse.kind import Asking, Kind
from lipass.kernels.plan import BlockPlan

# Batch, heads, text, history, current, tile; head dim, whether blocks are runs.
CALLS: dict[str, tuple[tuple, int, bool]] = {
    "decode, tails, text": ((2, 3, 33, (5, 9, 13), (4, 9, 13), (4, 8, 4)), 128, False),
    "decode in runs": ((2, 3, 33, (5, 9, 13), (4, 9, 13), (4, 8, 4)), 128, True),
    "prefill, text": ((1, 2, 200, NONE, (8, 16, 8), (4, 8, 4)), 128, False),
    "prefill, tails, no text": ((1, 2, 0, NONE, (5, 22, 40), (1, 32, 4)), 128, False),
    "head dim 64, blocks of 64": ((1, 4, 5, (6, 16, 16), (4, 16, 16), (4, 4, 4)), 64, False),
}
OF_POINTERS = {
    "head dim 112, blocks of 64": ((1, 4, 0, (12, 22, 40), (3, 22, 40), (1, 8, 8)), 112, False),
    "blocks of 256": ((1, 2, 9, (8, 8, 8), (4, 8, 8), (4, 8, 8)), 128, False),
    "blocks of 32": ((1, 2, 9, (4, 8, 8), (2, 8, 8), (1, 8, 4)), 64, False),
}
_REPEATS = 20
# Left for what is checked here once a process apart has passed.
_SPARE_S = 25.0


def main(argv: list[str] | None = None) -> int:
    """Check what was named; fail if a row is wrong."""
    part = Part(argv)
    torch.manual_seed(0)
    checks: dict[str, Callable[[Part], bool]] = {"planning": _planning, "operator": _operator}
    with torch.inference_mode():
        return 0 if checks.get(part.name, _kernel)(part) else 1


def _kernel(part: Part) -> bool:
    provider = "reference" if part.dry else part.name
    calls = {**CALLS, **(OF_POINTERS if part.name == "triton" else {})}
    right = True
    contends = part.name in registry.contenders("block_sparse", torch.device("cuda"))
    if contends and not part.dry and (tried := _tried(part)) is not None:
        return tried
    for name, (shape, dim, runs) in calls.items():
        if part.dry:
            shape = (
                *shape[:2],
                min(shape[2], 9),
                *(_small(grid) for grid in shape[3:5]),
                shape[5],
            )
        problem = Problem(part, *shape, dim=dim, runs=runs)
        if contends and (why := _why_not(problem, provider)):
            part.row(call=name, left_out=why)
            continue
        plan = problem.plan(0.4)
        plans: dict[str, tuple[BlockPlan, Tensor | None]] = {name: (plan, None)}
        # Each is compiled anew.
        first = name == next(iter(calls))
        if first:
            plans[f"{name}; segments not known"] = BlockPlan(
                plan.indices, plan.counts, plan.q_grid, plan.kv
            ), None  # fmt: skip
        if part.name == "triton" and first:
            bias = torch.randn(problem.q.shape[0], plan.kv.tokens, device=part.device)
            plans[f"{name}; bias"] = plan, bias
        for label, (one, bias) in plans.items():
            right &= _compared(part, label, provider, problem, one, bias)
        if first:
            right &= _without_lse(part, provider, problem, plan)
    return right


def _tried(part: Part) -> bool | None:
    """Try a provider that nobody has seen run; None where it may be used."""
    kind = Kind(part.device, part.dtype, 128, 128, 128, False)
    module = registry.module_of("block_sparse", part.name)
    why = module if isinstance(module, str) else module.unfit(kind)
    if why:
        part.row(call="in a process of its own", left_out=why)
        return True
    why = probe.try_out(part.name, kind, min(probe.LIMIT_S, part.left_s - _SPARE_S))
    part.row(call="in a process of its own", right=not why, failed=why)
    return False if why else None


def _why_not(p: Problem, provider: str) -> str | None:
    """Say why a provider refuses the call of a problem, or nothing."""
    module = registry.module_of("block_sparse", provider)
    if isinstance(module, str):
        return module
    return Asking(p.q, p.k, p.v, p.q_grid, p.layout, False)(module)


def _compared(
    part: Part, label: str, provider: str, p: Problem, plan: BlockPlan, bias: Tensor | None
) -> bool:
    def attend() -> tuple[Tensor, Tensor]:
        found = block_sparse_attention(
            p.q, p.k, p.v, plan, scale=p.scale, key_bias=bias, return_lse=True, provider=provider
        )
        assert isinstance(found, tuple)
        return found

    try:
        (out, lse), (wanted, wanted_lse) = attend(), p.expected(plan, bias)
        error = float((out.double() - wanted).norm() / wanted.norm())
        off = float((lse.double() - wanted_lse).abs().max())
        same = all(torch.equal(attend()[0], out) for _ in range(1 if part.dry else _REPEATS))
    except Exception as failure:  # the next call may still be right
        part.row(call=label, right=False, failed=f"{type(failure).__name__}: {failure}"[:500])
        return False
    right = error < 1e-2 and off < 2e-2 and same
    part.row(call=label, right=right, error=error, lse_error=off, always_the_same=same)
    return right


def _without_lse(part: Part, provider: str, p: Problem, plan: BlockPlan) -> bool:
    out, expected = (
        block_sparse_attention(p.q, p.k, p.v, plan, scale=p.scale, provider=provider),
        p.expected(plan)[0],
    )
    assert isinstance(out, Tensor)
    error = float((out.double() - expected).norm() / expected.norm())
    part.row(call="without log-sum-exp", right=error < 1e-2, error=error)
    return error < 1e-2


def _planning(part: Part) -> bool:
    """Compare what plans on a GPU with the definition there, to the id."""
    fast = "reference" if part.dry else "triton"
    right = True
    for name, (shape, dim, runs) in CALLS.items():
        if part.dry:
            small = [_small(grid) for grid in shape[3:5]]
            shape = (1, 1, min(shape[2], 9), *small, shape[5])
        p = Problem(part, *shape, dim=dim, runs=runs)
        q_means = [pool_blocks(p.q, p.q_grid, provider=n) for n in (fast, "vectorized")]
        grid = p.layout.segments[p.candidate].grid
        k_means = [pool_blocks(p.k[p.candidate], grid, provider=n) for n in (fast, "vectorized")]
        error = max(float((a - b).abs().max()) for a, b in (q_means, k_means))
        # Integers, so that scores are exact and many of them equal.
        ranked = [(means[0] * 9).round() for means in (q_means, k_means)]
        ids = [
            select_blocks(
                *ranked, p.layout, p.q_grid, budget=0.3, scale=p.scale, role=p.role,
                sink_latents=1, provider=provider,
            )[0]
            for provider in (fast, "reference")
        ]  # fmt: skip
        same = torch.equal(*ids)
        part.row(call=name, right=same and error < 1e-5, mean_error=error, ids_equal=same)
        right &= same and error < 1e-5
    return right


def _operator(part: Part) -> bool:
    """Call the operator: by hand, captured in a CUDA graph, and where no kernel takes it."""
    p = Problem(part, 1, 4, 33, (8, 16, 16), (4, 16, 16), (4, 8, 4), dim=64)
    with registry.force("sparse"):
        out = p.operator(0.3)
        counts = registry.telemetry()["day"]
        expected, _ = p.expected(p.plan(0.3))
        error = float((out.double() - expected).norm() / expected.norm())
        right = error < 1e-2 and counts.sparse_calls == 1
        part.row(call="operator", right=right, error=error, provider=counts.provider)
        if part.device.type == "cuda":
            part.wait()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = p.operator(0.3)
            graph.replay()
            part.wait()
            right &= torch.equal(captured, out)
            part.row(call="captured in a CUDA graph", right=torch.equal(captured, out))
    for name, dtype, dim in (("fp32", torch.float32, 64), ("head dim 72", part.dtype, 72)):
        part.dtype = dtype
        odd = Problem(part, 1, 2, 5, (4, 8, 8), (4, 8, 8), (4, 8, 4), dim=dim)
        registry.reset_telemetry()
        odd.operator(0.3)
        counts = registry.telemetry()["day"]
        dense = counts.dense_calls == 1 and counts.reason.startswith("no kernel takes it")
        right &= dense or part.dry
        part.row(call=f"dense: {name}", right=dense or part.dry, reason=counts.reason)
    return right


def _small(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    t, y, x = grid
    return min(t, 4), min(y, 9), min(x, 9)


if __name__ == "__main__":
    sys.exit(main())
