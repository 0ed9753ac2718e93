"""Random attention calls shared by the kernel tests."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from lipass.kernels.block_sparse import native
from lipass.kernels.plan import BlockGrid, KvLayout
from lipass.kernels.planning import plan_attention

# Built here, where no test's clock runs; some 10 s once per machine.
NO_NATIVE = native.build()
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(NO_NATIVE is not None, reason=f"{NO_NATIVE}")
)
PROVIDERS = ["reference", "gather", NATIVE]
ROLES = {"prefill": "text,current", "decode": "text,history,current"}


@dataclass
class Case:
    """One call: queries, keys and values by segment, and how to plan it."""

    q: torch.Tensor
    keys: list
    values: list
    layout: KvLayout
    q_grid: BlockGrid
    options: dict

    def plan(self, **changes):
        return plan_attention(
            self.q, self.keys, self.layout, self.q_grid, **(self.options | changes)
        )


def make_case(
    role,
    frames,
    size,
    text,
    tile,
    *,
    q_tile=None,
    budget=0.3,
    sink_latents=1,
    keep_frames=None,
    batch=1,
    heads=2,
    dim=8,
    dtype=torch.float32,
    new_frames=2,
):
    """Build a call; `frames` counts the history in decode and the context in prefill."""
    roles, grids = ("text", "current"), ((1, 1, text), (frames, *size))
    if role == "decode":
        roles, grids = ("text", "history", "current"), (*grids, (new_frames, *size))
    layout = KvLayout.build(roles, grids, tile)
    q_grid = BlockGrid(grids[-1], q_tile or tile)
    shape = (batch, heads, -1, dim)
    keys, values = (
        [torch.randn(batch, heads, part.grid.tokens, dim, dtype=dtype) for part in layout.segments]
        for _ in range(2)
    )
    q = torch.randn(batch, heads, q_grid.tokens, dim, dtype=dtype)
    assert q.view(shape).shape == q.shape
    options = {
        "budget": budget,
        "scale": dim**-0.5,
        "role": role,
        "sink_latents": sink_latents,
        "keep_frames": keep_frames,
    }
    return Case(q, keys, values, layout, q_grid, options)


def masked_dense(case, plan, key_bias=None):
    """Attend densely under the element mask of the plan, in fp64; give output and lse."""
    q, k, v = (x.double() for x in (case.q, torch.cat(case.keys, 2), torch.cat(case.values, 2)))
    score = (q @ k.mT) * case.options["scale"]
    if key_bias is not None:
        score = score + (key_bias if key_bias.dim() == 3 else key_bias[:, None])[:, :, None]
    score = score.masked_fill(~plan.to_dense_mask(), -torch.inf)
    return score.softmax(-1).nan_to_num(0.0) @ v, score.logsumexp(-1)


def arguments(case, site="site", **changes):
    """Spell a case as the operator's arguments."""
    options = case.options | changes
    grids = [size for part in case.layout.segments for size in part.grid.grid]
    return (
        case.q,
        case.keys,
        case.values,
        list(case.q_grid.grid),
        grids,
        ROLES[options["role"]],
        list(case.layout.segments[-1].grid.tile),
        options["budget"],
        options["scale"],
        options["sink_latents"],
        options["role"],
        options["keep_frames"],
        site,
    )


def dense(case, rows=None):
    k, v = torch.cat(case.keys, 2), torch.cat(case.values, 2)
    if rows is not None:
        k, v = k[:, :, rows], v[:, :, rows]
    return F.scaled_dot_product_attention(case.q, k, v, scale=case.options["scale"])


def frame_rows(case, keep):
    """Keys that stay when the candidate frames in `keep` do."""
    number = case.layout.candidate_segment(case.options["role"])
    rows = torch.ones(case.layout.tokens, dtype=torch.bool)
    span, grid = case.layout.token_range(number), case.layout.segments[number].grid.grid
    rows[span.start : span.stop] = keep.repeat_interleave(grid[1] * grid[2])
    return rows


@st.composite
def cases(draw):
    """Small calls of every kind: odd grids, empty text, dropped frames, larger query tiles."""
    tile = draw(st.sampled_from([(4, 4, 4), (1, 3, 2), (2, 2, 4), (1, 8, 8), (4, 8, 4)]))
    times = draw(st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 1, 1)]))
    frames, batch = draw(st.integers(1, 9)), draw(st.integers(1, 2))
    keep = None
    if draw(st.booleans()):
        bits = st.lists(st.booleans(), min_size=frames, max_size=frames)
        keep = torch.tensor([draw(bits) for _ in range(batch)])
    return make_case(
        draw(st.sampled_from(["prefill", "decode"])),
        frames,
        (draw(st.integers(1, 6)), draw(st.integers(1, 7))),
        draw(st.sampled_from([0, 1, 5, 33])),
        tile,
        q_tile=tuple(a * b for a, b in zip(tile, times, strict=True)),
        budget=draw(st.sampled_from([0.1, 0.3, 0.7, 1.0])),
        sink_latents=draw(st.integers(0, 2)),
        keep_frames=keep,
        batch=batch,
        heads=draw(st.integers(1, 2)),
        dim=4,
    )
