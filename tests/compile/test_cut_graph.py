"""Graphs with outlined calls run in pieces, and each piece as what it is."""

import pytest
import torch
from torch import nn

from lipass.compile.cut_graph import _past_caches, compile_parts
from lipass.passes.core import PassContext, PassPipeline
from lipass.passes.runner import run_pipeline

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

PIPELINE = PassPipeline.parse("canonicalize,find-attention,find-steps,guard-steps")
X, S = torch.randn(2, 4), torch.rand(5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x, sigma):
        return torch.tanh(self.lin(x)) * sigma


def euler(net, between=lambda x: x, scale=1.0):
    def fn(x, s, scale=scale):
        for i in range(3):
            x = between(x + (s[i + 1] - s[i]) * net(x, s[i]) * scale)
        return x

    return fn


def heavy(x):
    """More calls than are left to run as they are."""
    for _ in range(10):
        x = (x + 0.1).sin()
    return x


@pytest.fixture
def check():
    """Compare a function in pieces with itself; return the pieces that were compiled."""

    def run(fn, *calls):
        compiled = []

        def inner_compile(piece, args):
            assert len(args) == len(piece.graph.find_nodes(op="placeholder"))
            compiled.append(piece)
            return piece.forward

        def backend(gm, example_inputs):
            compiled.clear()
            run_pipeline(PIPELINE, gm, PassContext.of(gm.graph))
            return compile_parts(gm, example_inputs, inner_compile)

        fast = torch.compile(fn, backend=backend)
        with torch.no_grad():
            for args in calls:
                torch.testing.assert_close(fast(*args), fn(*args))
        return compiled

    return run


def test_steps_share_one_body_and_samplers_arithmetic_runs_as_it_is(check):
    (body,) = check(euler(Net()), (X, S))
    assert "tanh" in body.code


def test_long_pieces_between_steps_are_compiled(check):
    pieces = check(euler(Net(), between=heavy), (X, S))
    assert len(pieces) == 4
    assert sum("tanh" in piece.code for piece in pieces) == 1
    assert sum(piece.code.count("sin()") == 10 for piece in pieces) == 3


def test_pieces_return_tuples_to_the_inner_compiler(check):
    for piece in check(euler(Net(), between=heavy), (X, S)):
        assert isinstance(piece.graph.output_node().args[0], tuple)


def test_float_that_varies(check):
    fn = euler(Net(), between=heavy)
    check(fn, (X, S, 0.5), (X, S, 0.25), (X, S, 0.125))


def test_size_that_varies(check):
    check(euler(Net(), between=heavy), (X, S), (torch.randn(6, 4), S), (torch.randn(9, 4), S))


def test_piece_whose_cached_guards_cannot_be_checked_is_compiled_anew():
    cached = []

    def inner_compile(piece, args):
        cached.append(torch._inductor.config.fx_graph_cache)
        if cached[-1]:
            raise KeyError("w2c")
        return piece

    with torch._inductor.config.patch(fx_graph_cache=True):
        assert _past_caches(inner_compile)("piece", []) == "piece"
        assert torch._inductor.config.fx_graph_cache
    assert cached == [True, False]
