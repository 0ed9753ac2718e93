"""Pieces of one role are one run, wherever they lie: a sink and a window, two prompts."""

import torch
from attending import TEXT, attend, describe, heads, kv, latents
from torch.nn import functional as F

from lipass.kernels import registry
from lipass.passes.attention.sparse_call import SparseCall


def sink_and_window(x, cache, start):
    """Keys of the first latent and of the latest ones, from the cache that the call writes to."""
    q = heads(x.flatten(2).mT)
    own = q * 2
    cache[:, :, start : start + 64] = own
    key = torch.cat([cache[:, :, :16], cache[:, :, start - 48 : start], own], 2)
    return F.scaled_dot_product_attention(q, key, key * 3)


def test_a_sink_and_a_window_are_one_history(trace, apply):
    gm = trace(sink_and_window, (latents(), kv(512), 128), (latents(), kv(512), 192))
    apply(gm, TEXT)
    assert describe(gm).splitlines()[1:] == [
        "  history (4, 4, 4): it is in the cache that the call writes to",
        "  current (4, 4, 4): made from the tokens of q",
    ]


def test_runs_of_a_history_that_options_name(trace, apply):
    def fn(x, text, far, near):
        return attend(x, text, far, near)

    inputs = [(latents(), kv(6), kv(32), kv(16 * n)) for n in (4, 5)]
    gm = trace(fn, *inputs)
    apply(gm, "canonicalize,find-attention{segments=text+history+history+current}")
    assert describe(gm).splitlines()[1:] == [
        "  text (1, 1, 6): named in segments",
        "  history (((n//16)) + 2, 4, 4): named in segments",
        "  current (4, 4, 4): made from the tokens of q",
    ]


def test_runs_of_a_history_are_joined_where_they_are_read(trace, apply):
    calls = [(latents(), kv(512), start) for start in (128, 192)]
    gm = trace(sink_and_window, *calls)
    apply(gm, "canonicalize,find-attention,sparse-attention{budget_decode=1.0}")
    (call,) = map(SparseCall.of, SparseCall.nodes(gm.graph))
    assert call.roles == ("history", "current")
    x, cache, start = calls[1]
    expected = sink_and_window(x, cache.clone(), start)
    given = {"l_x_": x, "l_cache_": cache.clone()}
    args = [
        next((v for k, v in given.items() if k in n.name), start)
        for n in gm.graph.find_nodes(op="placeholder")
    ]
    with registry.force("sparse"):
        torch.testing.assert_close(gm(*args)[0], expected)


def test_keys_may_come_in_any_order(trace, apply):
    def fn(x, text, history):
        q = heads(x.flatten(2).mT)
        key = torch.cat([history, q * 0.5, text], 2)
        value = torch.cat([history + 1, q * 3, text + 2], 2)
        return F.scaled_dot_product_attention(q, key, value)

    inputs = [(latents(), kv(6), kv(16 * n)) for n in (4, 5)]
    gm = trace(fn, *inputs)
    apply(gm, "canonicalize,find-attention,sparse-attention{budget_decode=1.0}")
    (call,) = map(SparseCall.of, SparseCall.nodes(gm.graph))
    assert call.roles == ("text", "history", "current")
    args = dict(zip(("l_x_", "l_text_", "l_history_"), inputs[1], strict=True))
    given = [
        next((v for k, v in args.items() if k in n.name), 80)
        for n in gm.graph.find_nodes(op="placeholder")
    ]
    with registry.force("sparse"):
        torch.testing.assert_close(gm(*given)[0], fn(*inputs[1]))


def test_two_prompts_are_one_text(found, grown):
    def fn(x, text, history):
        return attend(x, text, text[:, :, :5] + 1, history)

    assert found(fn, *grown) == [("decode", "it has history keys")]
