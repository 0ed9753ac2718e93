"""Calls of einops that are one node become the calls of torch that they make."""

import pytest
import torch
from einops import rearrange, repeat
from torch.nn import functional as F

from lipass.compile.gate import measured_gate
from lipass.passes.attention.site import sites
from lipass.passes.core import PassContext, PassPipeline
from lipass.passes.runner import run_pipeline

TEXT = "canonicalize"

X = torch.randn(2, 6, 24)

PATTERNS = {
    "heads apart": lambda x: rearrange(x, "b l (h d) -> b l h d", h=4),
    "heads first": lambda x: rearrange(x, "b l (h d) -> b h l d", d=6),
    "three at once": lambda x: rearrange(x, "B L (K H D) -> K B L H D", K=3, H=2)[1],
    "transpose": lambda x: rearrange(x, "b l c -> b c l"),
    "join": lambda x: rearrange(x, "b l c -> (b l) c"),
    "rows a token": lambda x: repeat(x, "b t c -> b (t y x) c", y=2, x=3),
    "rows out of the batch": lambda x: repeat(x.flatten(0, 1), "(b t) c -> b (t n) c", b=2, n=5),
    "streams": lambda x: repeat(x, "b s d -> (b r) s d", r=2),
    "streams in front": lambda x: repeat(x, "b s d -> (r b) s d", r=2),
    "new axis in front": lambda x: repeat(x, "... -> n ...", n=3),
    "axis of one": lambda x: rearrange(x, "b l c -> b 1 l c"),
    "axis of one gone": lambda x: rearrange(x[:, None], "b 1 l c -> b l c"),
    "ellipsis": lambda x: rearrange(x, "... (two d) -> two ... d", two=2),
    "ellipsis joined": lambda x: rearrange(x, "... d -> (...) d"),
    "nothing": lambda x: rearrange(x, "b l c -> b l c"),
    "by name": lambda x: rearrange(tensor=x, pattern="b l c -> l (b c)"),
}


def is_whole(node):
    return str(getattr(node.target, "__module__", "")).startswith("einops")


@pytest.mark.parametrize("fn", PATTERNS.values(), ids=PATTERNS)
def test_result_is_the_same_to_the_bit(fn, trace, apply):
    def scaled(x):
        return fn(x) * 2

    gm = trace(scaled, (X,))
    compiled = torch.compile(scaled, backend=lambda _, __: gm.forward)
    apply(gm, TEXT)
    assert not [node for node in gm.graph.nodes if is_whole(node)]
    assert torch.equal(compiled(X), scaled(X))


def test_lengths_may_vary(fresh_dynamo):
    graphs = []

    def keeping(gm, inputs):
        run_pipeline(PassPipeline.parse(TEXT, {}), gm, PassContext.of(gm.graph, measured_gate))
        graphs.append(gm)
        return gm

    def every(x):
        return [fn(x) for fn in PATTERNS.values() if fn is not PATTERNS["rows out of the batch"]]

    compiled = torch.compile(every, backend=keeping, dynamic=True)
    for length in (6, 9, 12):
        x = torch.randn(2, length, 24)
        assert all(map(torch.equal, compiled(x), every(x)))
    assert len(graphs) == 1
    assert not [node for node in graphs[0].graph.nodes if is_whole(node)]


def test_views_stay_views(trace, apply):
    def fn(x):
        return rearrange(x, "b l (h d) -> b h l d", h=4)

    gm = trace(fn, (X,))
    compiled = torch.compile(fn, backend=lambda _, __: gm.forward)
    apply(gm, TEXT)
    assert compiled(X).data_ptr() == X.data_ptr()


def test_lists_of_tensors_stay(trace, apply):
    def fn(x):
        return rearrange([x, x + 1], "two b l c -> b l (two c)")

    gm = trace(fn, (X,))
    compiled = torch.compile(fn, backend=lambda _, __: gm.forward)
    apply(gm, TEXT)
    assert torch.equal(compiled(X), fn(X))


def test_tokens_made_by_a_pattern_have_a_grid(trace, apply):
    def fn(x):
        tokens = rearrange(x, "b c t y x -> b (t y x) c")
        q, k, v = rearrange(tokens.repeat(1, 1, 3), "b l (n h d) -> n b h l d", n=3, h=2)
        return F.scaled_dot_product_attention(q, k * 2, v * 3)

    gm = trace(fn, (torch.randn(1, 16, 4, 6, 5),))
    apply(gm, "canonicalize,find-attention")
    ((_, site),) = sites(gm.graph)
    assert (site.role, site.q_grid) == ("self", (4, 6, 5))
