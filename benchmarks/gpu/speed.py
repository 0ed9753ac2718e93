"""Time the kernels beside dense attention and FlexAttention, at the sizes of released models.

`ratio` is time over `density x best dense time`, by tokens that meet, so 1 is what skipping blocks
could give at most. A rival gets tokens in the order of its blocks, whole blocks and its lists for
nothing; ours is also timed as the operator runs it, planning included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lipass.kernels.ops  # noqa: F401
from benchmarks.gpu.part import Part
from benchmarks.gpu.problem import NONE, Problem
from lipass.kernels import block_sparse_attention, pool_blocks, registry
from lipass.kernels.plan import BlockPlan

Call = Callable[[], object]
_TILE = (4, 8, 4)
CASES: dict[str, tuple] = {  # batch, heads, text, history, current, tile
    "worldplay decode 12k": (2, 16, 929, (8, 30, 52), (4, 30, 52), _TILE),
    "worldplay prefill 18k": (2, 16, 929, NONE, (12, 30, 52), _TILE),
    "self-forcing": (1, 12, 0, (18, 30, 52), (3, 30, 52), (1, 32, 4)),
    "matrix-game-3": (1, 24, 0, NONE, (20, 22, 40), _TILE),
    "worldplay decode 37k": (2, 16, 929, (24, 30, 52), (4, 30, 52), _TILE),
    "worldplay prefill 31k": (2, 16, 929, NONE, (20, 30, 52), _TILE),
}
# Compiling FlexAttention takes seconds a form, so not all forms run everywhere.
_FLEX: dict[str, dict[str, Any]] = {
    "flex": {},
    "flex_tma": {"USE_TMA": True},
    "flex_flash": {"BACKEND": "FLASH"},
}
_FORMS_OF_FLEX = {
    "worldplay decode 12k": ("flex", "flex_tma", "flex_flash"),
    "worldplay prefill 18k": ("flex", "flex_tma"),
    "self-forcing": ("flex",),
    "matrix-game-3": ("flex",),
}
# Those that refuse a call, as before a probe has passed, say why.
_PROVIDERS = ("tma", "triton", "gluon", "fa4")
_BUDGETS = (0.3, 0.2, 0.5)
# A row of the largest case takes so long.
_A_ROW_S = 8.0


def main(argv: list[str] | None = None) -> int:
    """Write a row for each case and budget, as long as there is time."""
    part = Part(argv)
    torch.manual_seed(0)
    with torch.inference_mode():
        for case, shape in CASES.items():
            if part.left_s < 2 * _A_ROW_S and not part.dry:
                break
            if part.dry:
                shape = (
                    1,
                    1,
                    min(shape[2], 130),
                    *((min(g[0], 4), 8, 8) for g in shape[3:5]),
                    _TILE,
                )
            _case(part, case, shape)
    return 0


def _case(part: Part, case: str, shape: tuple) -> None:
    torch.compiler.reset()
    problem = Problem(part, *shape)
    dense, failed = part.times_ms(_dense_calls(problem))
    best = min(ms for name, ms in dense.items() if name != "cat")
    tflops = {name: problem.all_pairs * 512e-9 / ms for name, ms in dense.items() if name != "cat"}
    part.row(case=case, form="dense", ms=dense, tflops=tflops, failed=failed)
    for budget in _BUDGETS[:1] if part.dry or part.warm else _BUDGETS:
        if part.left_s < _A_ROW_S and not part.dry:
            break
        flex = _FORMS_OF_FLEX.get(case, ()) if budget == _BUDGETS[0] else ()
        _row(part, case, shape, problem, budget, best, flex)


def _row(
    part: Part, case: str, shape: tuple, problem: Problem, budget: float, best: float,
    flex: tuple[str, ...],
) -> None:  # fmt: skip
    calls: dict[str, Call] = {}
    pairs: dict[str, float] = {}
    laid = {"tiles": problem, "runs": Problem(part, *shape, runs=True)}
    for order, p in laid.items():
        plan = p.plan(budget)
        for name in ("reference",) if part.dry else _PROVIDERS:
            calls[f"{name}, {order}"] = _own(p, plan, name)
            pairs[f"{name}, {order}"] = p.pairs(plan)
    if flex:
        whole = Problem(part, *shape, runs=True, whole=True)
        plan = whole.plan(budget)
        for name in flex:
            calls[name] = _flex(part, whole, plan, _FLEX[name])
            pairs[name] = whole.pairs(plan)
    grid = problem.layout.segments[problem.candidate].grid
    known = pool_blocks(problem.k[problem.candidate], grid) if problem.role == "decode" else None
    rest: dict[str, Call] = {
        "plan": lambda: problem.plan(budget),
        "plan, known means": lambda: problem.plan(budget, known),
        "operator": lambda: problem.operator(budget),
    }
    with registry.force("sparse"):
        times, failed = part.times_ms({**calls, **rest}, rounds=4)
        host = part.host_us(lambda: problem.operator(budget))
    ran = {name: ms for name, ms in times.items() if name in pairs}
    part.row(
        case=case,
        budget=budget,
        density=float(problem.plan(budget).density()),
        ms=times,
        failed=failed,
        host_us_of_the_operator=host,
        tflops={name: pairs[name] * 512e-9 / ms for name, ms in ran.items()},
        of_best_dense={
            name: pairs[name] * best / (problem.all_pairs * ms) for name, ms in ran.items()
        },
        ratio={name: ms * problem.all_pairs / (best * pairs[name]) for name, ms in ran.items()},
    )


def _own(p: Problem, plan: BlockPlan, provider: str) -> Call:
    return lambda: block_sparse_attention(p.q, p.k, p.v, plan, scale=p.scale, provider=provider)


def _dense_calls(p: Problem) -> dict[str, Call]:
    k, v = torch.cat(p.k, 2), torch.cat(p.v, 2)

    def by(*backends: SDPBackend) -> Tensor:
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(p.q, k, v, scale=p.scale)

    return {
        "flash": lambda: by(SDPBackend.FLASH_ATTENTION),
        "cudnn": lambda: by(SDPBackend.CUDNN_ATTENTION),
        "default": lambda: F.scaled_dot_product_attention(p.q, k, v, scale=p.scale),
        "cat": lambda: (torch.cat(p.k, 2), torch.cat(p.v, 2)),
    }


def _flex(part: Part, p: Problem, plan: BlockPlan, options: dict[str, Any]) -> Call:
    """Return FlexAttention over the blocks of a plan, all of which are whole runs."""
    made: list[Call] = []

    def first() -> Call:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        k, v = torch.cat(p.k, 2), torch.cat(p.v, 2)
        none = torch.zeros(*plan.counts.shape, plan.kv.blocks, dtype=torch.int32, device=k.device)
        ids = torch.cat([plan.indices, none[..., plan.indices.shape[-1] :]], -1)
        counts = plan.counts.contiguous()
        # FLASH drops the lists of whole blocks where the mask is trivial, so it gets one.
        mask = (lambda b, h, q, k: k >= 0) if "BACKEND" in options else None
        volume = plan.kv.block_tokens
        blocks = BlockMask.from_kv_blocks(
            torch.zeros_like(counts), none, counts, ids, BLOCK_SIZE=(volume, volume),
            mask_mod=mask, seq_lengths=(p.q.shape[2], k.shape[2]),
        )  # fmt: skip
        run = flex_attention if part.dry else torch.compile(flex_attention, dynamic=False)
        given = {} if part.dry else {"kernel_options": options}
        return lambda: run(p.q, k, v, block_mask=blocks, scale=p.scale, **given)

    def call() -> object:
        if not made:
            made.append(first())
        return made[0]()

    return call


if __name__ == "__main__":
    sys.exit(main())
