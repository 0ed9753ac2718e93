"""Compare the Triton kernels of pooling and selection with the references under the interpreter.

Run by test_triton_planning.py in a process of its own, as TRITON_INTERPRET must be set before
Triton is first imported. Means are small integers where they are ranked, so that scores are exact
and many of them equal.
"""

import math
import os

import numpy
import torch

from lipass.kernels import pool_blocks, select_blocks
from lipass.kernels.plan import BlockGrid, KvLayout

assert os.environ["TRITON_INTERPRET"] == "1"
# Fills `torch.empty`, so that unwritten output is seen.
torch.use_deterministic_algorithms(True)
torch.manual_seed(0)


def check_pool(label, x, grid):
    found, expected = (pool_blocks(x, grid, provider=name) for name in ("triton", "reference"))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert found.is_contiguous()
    print("ok", label)


def tokens(size, dim=24, batch=1, heads=2):
    return torch.randn(batch, heads, math.prod(size), dim)


check_pool("full tiles", tokens((4, 8, 4)), BlockGrid((4, 8, 4), (2, 4, 4)))
for axis in range(3):
    size = tuple(4 + (axis == other) for other in range(3))
    check_pool(f"tail on axis {axis}", tokens(size), BlockGrid(size, (2, 4, 4)))
check_pool("tails on every axis", tokens((3, 5, 7), batch=2), BlockGrid((3, 5, 7), (2, 4, 4)))
check_pool("volume no power of two", tokens((4, 5, 7)), BlockGrid((4, 5, 7), (3, 5, 4)))
check_pool("one block of one token", tokens((1, 1, 1)), BlockGrid((1, 1, 1), (1, 1, 32)))
check_pool("empty grid", tokens((1, 1, 0)), BlockGrid((1, 1, 0), (1, 1, 32)))
x = tokens((4, 8, 8), dim=128, heads=1)
check_pool("tile in parts", x, BlockGrid((4, 8, 8), (4, 8, 4)))
for dtype in (torch.float16, torch.bfloat16):
    check_pool(str(dtype), tokens((3, 4, 5)).to(dtype), BlockGrid((3, 4, 5), (2, 4, 4)))
x = tokens((3, 4, 5))
grid = BlockGrid((3, 4, 5), (2, 4, 4))
check_pool("token by token in memory", x.transpose(1, 2).contiguous().transpose(1, 2), grid)
check_pool("transposed in memory", x.mT.contiguous().mT, grid)
check_pool("every other number", tokens((3, 4, 5), dim=48)[..., ::2], grid)


def check_select(label, q_mean, k_mean, layout, q_grid, **options):
    options = {"sink_latents": 1, "scale": 0.3, **options}
    found, counts = select_blocks(q_mean, k_mean, layout, q_grid, provider="triton", **options)
    expected, expected_counts = select_blocks(
        q_mean, k_mean, layout, q_grid, provider="reference", **options
    )
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    torch.testing.assert_close(counts, expected_counts, atol=0, rtol=0)
    print("ok", label)


def ranked(role, grids, tile, *, q_tile=None, dim=8, batch=1, heads=2):
    """Draw means of text, history and current, or of those that `grids` has."""
    roles = ("text", "history", "current")[-len(grids) :]
    if role == "prefill":
        roles = ("text", "current")[-len(grids) :]
    layout = KvLayout.build(roles, grids, tile)
    q_grid = BlockGrid(grids[-1], q_tile or tile)
    candidates = layout.segments[layout.candidate_segment(role)].grid.blocks
    q_mean, k_mean = (
        torch.randint(-2, 3, (batch, heads, blocks, dim)).float()
        for blocks in (q_grid.blocks, candidates)
    )
    return q_mean, k_mean, layout, q_grid


case = ranked("decode", ((1, 1, 33), (7, 5, 6), (2, 5, 6)), (1, 4, 4))
for budget in (0.1, 0.5, 0.9, 1.0):
    check_select(f"text, history, current, {budget=}", *case, budget=budget, role="decode")
check_select("no sink", *case, budget=0.3, role="decode", sink_latents=0)
check_select("sink is all", *case, budget=0.3, role="decode", sink_latents=7)
check_select("nothing of the history", *case, budget=1e-9, role="decode", sink_latents=0)
case = ranked("decode", ((7, 5, 6), (1, 5, 6)), (1, 4, 4), batch=2)
check_select("without text", *case, budget=0.4, role="decode")
case = ranked("prefill", ((1, 1, 5), (5, 7, 6)), (2, 4, 4), batch=2)
check_select("prefill, tiles around", *case, budget=0.2, role="prefill")
case = ranked("prefill", ((1, 1, 5), (4, 7, 9)), (1, 4, 4), q_tile=(2, 4, 8))
check_select("prefill, larger query tiles", *case, budget=0.1, role="prefill")
case = ranked("prefill", ((2, 3, 4),), (2, 4, 4), heads=1)
check_select("one block", *case, budget=0.5, role="prefill")
case = ranked("decode", ((1, 1, 5), (0, 4, 4), (1, 4, 4)), (1, 4, 4))
check_select("empty history", *case, budget=0.5, role="decode")
case = ranked("decode", ((1, 1, 3), (150, 1, 2), (9, 1, 2)), (1, 1, 2), dim=40, heads=1)
check_select("more candidates than one scan, head dim padded", *case, budget=0.3, role="decode")
q_mean, k_mean, *grids = case
check_select(
    "strided", q_mean.mT.contiguous().mT, k_mean.transpose(1, 2).contiguous().transpose(1, 2),
    *grids, budget=0.7, role="decode",
)  # fmt: skip
check_select("all equal", 0 * q_mean, k_mean, *grids, budget=0.25, role="decode")
q_mean += 0.01 * torch.rand_like(q_mean)
check_select("none equal", q_mean, k_mean, *grids, budget=0.5, role="decode")
# 0 is of the sink; products with 70 are beyond fp32, on both sides.
k_mean[:, :, [0, 3, 140]], k_mean[:, :, 70, 0] = math.nan, 3e38
q_mean[:, :, 2] = math.nan
with numpy.errstate(all="ignore"):
    for budget in (0.02, 0.5, 0.99):
        check_select(
            f"NaN and infinity, {budget=}", q_mean, k_mean, *grids, budget=budget, role="decode"
        )
