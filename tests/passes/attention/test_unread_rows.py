"""Queries that are joined for whole blocks, and whose rows are cut off again, are left out."""

import pytest
import torch
from attending import describe, heads, kv, latents
from torch.nn import functional as F

from lipass.passes.attention.site import SDPA

TEXT = "canonicalize,find-attention"


def padded(x, past, cut=lambda out, n: out[:, :, :n], zeros=14):
    """Fill up to a whole block of queries and keys, as for FlexAttention."""
    q = heads(x.flatten(2).mT)
    more = q.new_zeros(1, 2, zeros, 8)
    queries = torch.cat([q, more], 2)
    key = torch.cat([past, q * 0.5, more], 2)
    value = torch.cat([past + 1, q * 3, more], 2)
    return cut(F.scaled_dot_product_attention(queries, key, value), q.shape[2])


def behind_other_axes(out, n):
    return out.permute(0, 2, 1, 3)[:, :n, :, :].flatten(2)


@pytest.mark.parametrize("cut", [lambda out, n: out[:, :, :n], behind_other_axes])
def test_rows_that_are_cut_off_are_left_out(trace, apply, cut):
    def fn(x, past):
        return padded(x, past, cut)

    inputs = (latents(), kv(6))
    gm = trace(fn, inputs)
    apply(gm, TEXT)
    (call,) = gm.graph.find_nodes(op="call_function", target=SDPA)
    assert call.meta["example_value"].shape == (1, 2, 64, 8)
    torch.testing.assert_close(gm(*inputs)[0], fn(*inputs))
    assert describe(gm).splitlines()[1:] == [
        "  text (1, 1, 20): no whole number of latents of 16",
        "  current (4, 4, 4): made from the tokens of q",
    ]


@pytest.mark.parametrize(
    "cut",
    [
        lambda out, n: out,
        lambda out, n: out[:, :, n:],
        lambda out, n: out[:, :, : n + 1],
        lambda out, n: out[:, :, :n] + out[:, :, -1:],
        lambda out, n: out[:, :, :n, :4],
        lambda out, n: out[:, :, :n:2],
    ],
    ids=["whole", "last", "one more", "both", "features", "every other"],
)
def test_rows_that_are_read_stay(trace, apply, cut):
    def fn(x, past):
        return padded(x, past, cut)

    inputs = (latents(), kv(6))
    gm = trace(fn, inputs)
    apply(gm, TEXT)
    (call,) = gm.graph.find_nodes(op="call_function", target=SDPA)
    assert call.meta["example_value"].shape == (1, 2, 78, 8)
    torch.testing.assert_close(gm(*inputs)[0], fn(*inputs))


def queries_written(q, queries):
    queries.mul_(2)


def own_queries_written(q, queries):
    q.mul_(2)


@pytest.mark.parametrize("write", [queries_written, own_queries_written])
def test_queries_that_are_written_to_once_they_are_joined_stay(trace, apply, write):
    def fn(x, past):
        q = heads(x.flatten(2).mT) + 1
        queries = torch.cat([q, q.new_zeros(1, 2, 14, 8)], 2)
        write(q, queries)
        return F.scaled_dot_product_attention(queries, past, past)[:, :, : q.shape[2]]

    inputs = (latents(), kv(6))
    gm = trace(fn, inputs)
    apply(gm, TEXT)
    (call,) = gm.graph.find_nodes(op="call_function", target=SDPA)
    assert call.meta["example_value"].shape == (1, 2, 78, 8)
    torch.testing.assert_close(gm(*inputs)[0], fn(*inputs))
