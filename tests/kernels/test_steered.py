"""Scores that differ between latents: as a mask of queries and keys says, without making one."""

import contextlib

import pytest
import torch
from torch.nn import functional as F

import lipass.kernels.ops  # noqa: F401
from lipass.kernels import registry
from lipass.kernels.steered import attend_by_latent

LATENTS, PER_LATENT, TEXT, HISTORY = 4, 16, 6, 64
TOKENS = LATENTS * PER_LATENT
KEYS = TEXT + HISTORY + TOKENS


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(batch=1):
    q = drawn(batch, 2, TOKENS, 16)
    return q, drawn(batch, 2, KEYS, 16, seed=1), drawn(batch, 2, KEYS, 16, seed=2)


def masked(q, k, v, bias):
    mask = bias.repeat_interleave(PER_LATENT, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@contextlib.contextmanager
def told(*, ramps):
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(registry.answer("steering_bias", lambda *_: None))
        if ramps:
            scopes.enter_context(registry.answer("steering_ramps", lambda: True))
        yield


BIAS = drawn(1, 1, LATENTS, KEYS, seed=3)


@pytest.mark.parametrize("batch", [1, 2], ids=["one", "two"])
def test_latents_as_a_batch_are_attention_under_a_mask(batch):
    q, k, v = qkv(batch)
    out = attend_by_latent(q, k, v, BIAS, None)
    torch.testing.assert_close(out, masked(q, k, v, BIAS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ramps", [False, True])
def test_a_bias_is_not_rounded_to_the_dtype_of_the_queries(dtype, ramps):
    q, k, v = (x.to(dtype) for x in qkv())
    bias = torch.zeros(1, 1, LATENTS, KEYS)
    bias[..., 0], bias[..., 1] = 8192.0, 8194.0  # fp16 counts by 8 there, bf16 by 64
    with told(ramps=ramps):
        out = torch.ops.lipass.attend_steered(q, k, v, bias)
    expected = masked(q.double(), k.double(), v.double(), bias.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_text_may_be_hidden_from_some_latents():
    q, k, v = qkv()
    bias = BIAS.clone()
    bias[:, :, :2, :TEXT] = -torch.inf
    out = attend_by_latent(q, k, v, bias, None)
    torch.testing.assert_close(out, masked(q, k, v, bias), rtol=0, atol=1e-5)


def test_nothing_is_added_where_nobody_says_anything():
    q, k, v = qkv()
    out = torch.ops.lipass.attend_steered(q, k, v, BIAS)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("ramps", [False, True], ids=["one row", "rows"])
def test_what_is_said_holds_for_all_latents_or_for_each(ramps):
    q, k, v = qkv()
    with told(ramps=ramps):
        out = torch.ops.lipass.attend_steered(q, k, v, BIAS)
    bias = BIAS if ramps else BIAS[:, :, :1].expand_as(BIAS)
    torch.testing.assert_close(out, masked(q, k, v, bias), rtol=0, atol=1e-5)
    torch.library.opcheck(torch.ops.lipass.attend_steered.default, (q, k, v, BIAS))


def sparse(q, k, v, bias, *, keep=None, lse=False, **given):
    sizes = [TEXT, HISTORY, TOKENS]
    call = torch.ops.lipass.sparse_attention_lse if lse else torch.ops.lipass.sparse_attention
    return call(
        q, list(k.split(sizes, 2)), list(v.split(sizes, 2)), [4, 4, 4],
        [1, 1, TEXT, 4, 4, 4, 4, 4, 4], "text,history,current", [1, 4, 4], 0.5, 0.25, 0,
        "decode", keep, "site", key_bias=bias, **given,
    )  # fmt: skip


def test_a_sparse_call_is_dense_while_latents_differ_and_says_so():
    registry.reset_telemetry()
    q, k, v = qkv()
    with told(ramps=True):
        out = sparse(q, k, v, BIAS)
    torch.testing.assert_close(out, masked(q, k, v, BIAS), rtol=0, atol=1e-5)
    counts = registry.telemetry()["site"]
    assert (counts.dense_calls, counts.density) == (1, 1.0)
    assert counts.reason == "the prompt changes from latent to latent"


def test_dropped_latents_stay_dropped_while_latents_differ():
    q, k, v = qkv()
    keep = torch.tensor([[True, False, True, True]])
    with told(ramps=True):
        out = sparse(q, k, v, BIAS, keep=keep)
    bias = BIAS.clone()
    bias[..., TEXT + 16 : TEXT + 32] = -torch.inf
    torch.testing.assert_close(out, masked(q, k, v, bias), rtol=0, atol=1e-5)


def test_a_sparse_call_is_as_without_a_bias_where_nobody_says_anything():
    q, k, v = qkv()
    with registry.force("sparse"):
        plain = sparse(q, k, v, None)
        assert torch.equal(sparse(q, k, v, BIAS), plain)
        with told(ramps=False):
            row = sparse(q, k, v, BIAS)
        assert torch.equal(row, sparse(q, k, v, BIAS[:, :, 0]))


@pytest.mark.parametrize(
    ("latents", "keys"), [(3, KEYS), (LATENTS, KEYS - 1)], ids=["latents", "keys"]
)
def test_rows_of_other_latents_or_keys_are_refused(latents, keys):
    with told(ramps=True), pytest.raises(ValueError, match=r"key_bias for each latent must be"):
        sparse(*qkv(), drawn(1, 1, latents, keys))


def test_partial_attention_has_one_bias():
    with told(ramps=True), pytest.raises(ValueError, match=r"a log-sum-exp is of calls .*'slerp'"):
        sparse(*qkv(), BIAS, lse=True)
