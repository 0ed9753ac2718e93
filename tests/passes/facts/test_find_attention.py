"""Which calls are attention over latents, and which forms of a call are left alone."""

import pytest
import torch
from attending import HISTORY, TEXT, attend, describe, heads, kv, latents
from expecttest import assert_expected_inline
from torch.nn import functional as F

from lipass.passes.attention.site import sites


def test_decode(trace, apply, mini, inputs):
    gm = trace(mini, inputs(4).decode, inputs(8).decode)
    apply(gm, TEXT)
    assert_expected_inline(
        describe(gm),
        """\
blocks.0:decode: decode, it has history keys; q (4, 4, 4)
  text (1, 1, 6): no whole number of latents of 16
  history ((n//16), 4, 4): l_w2c_ has a camera for each of its latents
  current (4, 4, 4): made from the tokens of q
blocks.1:decode: decode, it has history keys; q (4, 4, 4)
  text (1, 1, 6): no whole number of latents of 16
  history ((n//16), 4, 4): l_w2c_ has a camera for each of its latents
  current (4, 4, 4): made from the tokens of q
""",
    )


def test_prefill(trace, apply, mini, inputs):
    gm = trace(mini, inputs(4).prefill)
    apply(gm, TEXT)
    assert_expected_inline(
        describe(gm),
        """\
blocks.0:prefill: prefill, its keys are returned; q (4, 4, 4)
  text (1, 1, 6): no whole number of latents of 16
  current (4, 4, 4): made from the tokens of q
""",
    )


def test_unrolled_chunk(trace, apply, mini, inputs):
    gm = trace(mini.chunk, inputs(4).chunk)
    apply(gm, TEXT)
    assert_expected_inline(
        describe(gm),
        """\
blocks.0:prefill: prefill, its keys are history to later calls; q (4, 4, 4)
  text (1, 1, 6): no whole number of latents of 16
  current (4, 4, 4): made from the tokens of q
blocks.0@1:decode: decode, it has history keys; q (4, 4, 4)
  text (1, 1, 6): no whole number of latents of 16
  history (4, 4, 4): keys of blocks.0:prefill
  current (4, 4, 4): made from the tokens of q
blocks.1@1:decode: decode, it has history keys; q (4, 4, 4)
  text (1, 1, 6): no whole number of latents of 16
  history (4, 4, 4): l_w2c_ has a camera for each of its latents
  current (4, 4, 4): made from the tokens of q
blocks.0@2:decode: decode, it has history keys; q (4, 4, 4)
  text (1, 1, 6): no whole number of latents of 16
  history (4, 4, 4): keys of blocks.0:prefill
  current (4, 4, 4): made from the tokens of q
blocks.1@2:decode: decode, it has history keys; q (4, 4, 4)
  text (1, 1, 6): no whole number of latents of 16
  history (4, 4, 4): l_w2c_ has a camera for each of its latents
  current (4, 4, 4): made from the tokens of q
blocks.0@3:decode: decode, it has history keys; q (4, 4, 4)
  text (1, 1, 6): no whole number of latents of 16
  history (4, 4, 4): keys of blocks.0:prefill
  current (4, 4, 4): made from the tokens of q
blocks.1@3:decode: decode, it has history keys; q (4, 4, 4)
  text (1, 1, 6): no whole number of latents of 16
  history (4, 4, 4): l_w2c_ has a camera for each of its latents
  current (4, 4, 4): made from the tokens of q
""",
    )


def test_pass_annotates_and_changes_nothing(trace, apply, mini, inputs):
    records, _ = apply(trace(mini, inputs(4).decode), TEXT)
    assert [record.changed for record in records] == [True, False]


def test_history_of_a_length_that_varies(found, grown):
    assert found(attend, *grown) == [("decode", "it has history keys")]


def test_history_with_a_camera_for_each_latent(found):
    def fn(x, text, history, w2c):
        return attend(x, text, history) * w2c.sum()

    args = (latents(), kv(6), kv(16 * HISTORY), torch.randn(1, HISTORY + 4, 4, 4))
    assert found(fn, args) == [("decode", "it has history keys")]


def test_history_guards_its_length(trace, apply, grown):
    gm = trace(attend, *grown)
    apply(gm, TEXT)
    ((_, site),) = sites(gm.graph)
    tokens = site.segments[1].tokens
    env = tokens.node.shape_env
    assert any("Mod" in str(guard.expr) for guard in env.guards)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout_p": 0.1}, "dropout is 0.1"),
        ({"is_causal": True}, "it is causal"),
        ({"attn_mask": (64, 1)}, "it has a mask [64, 1], which may differ between queries"),
        ({"attn_mask": (1, 1)}, "it has a mask [1, 1], which is broadcast over its keys"),
    ],
)
def test_attention_that_is_no_plain_softmax(found, grown, options, reason):
    mask = options.get("attn_mask")
    options = {key: value for key, value in options.items() if key != "attn_mask"}

    def fn(x, text, history):
        extra = {} if mask is None else {"attn_mask": x.new_zeros(mask)}
        return attend(x, text, history, **extra, **options)

    assert found(fn, *grown) == [("other", reason)]


def test_scale_may_be_an_int(found, grown):
    def fn(x, text, history):
        return attend(x, text, history, scale=1)

    assert found(fn, *grown) == [("decode", "it has history keys")]


def test_data_dependent_mask(found, grown):
    def fn(x, text, history):
        return attend(x, text, history, attn_mask=x.sum() > history[0, 0, :1, :1])

    reason = "it has a mask [1, 1], which is broadcast over its keys"
    assert found(fn, *grown) == [("other", reason)]


def test_a_prompt_that_is_padded_is_text(found):
    def fn(x, seen):
        q, there = heads(x), seen.bool()
        mask = there[:, None, :, None] & there[:, None, None, :]
        return F.scaled_dot_product_attention(q, q * 2, q * 3, attn_mask=mask)

    prompt, reason = torch.randn(1, 6, 16), "it has a mask [1, 1, 6, 6], which may differ between"
    ((role, told),) = found(fn, (prompt, torch.ones(1, 6).long()))
    assert (role, told) == ("text", f"{reason} queries")
    # A bias is no padding, nor is what is computed from the tokens.
    assert found(fn, (prompt, torch.ones(1, 6)))[0][0] == "other"

    def gated(x, seen):
        q = heads(x)
        mask = (seen.bool()[:, None, :, None] & seen.bool()[:, None, None, :]) & (x.sum() > 0)
        return F.scaled_dot_product_attention(q, q * 2, q * 3, attn_mask=mask)

    assert found(gated, (prompt, torch.ones(1, 6).long()))[0][0] == "other"


def test_padded_keys_beside_a_history_stay(found, grown):
    def fn(x, text, history):
        keys = text.shape[2] + history.shape[2] + 64
        return attend(x, text, history, attn_mask=x.new_zeros(1, 1, 1, keys))

    ((role, reason),) = found(fn, *grown)
    assert (role, reason) == ("other", "it has a mask")


def test_grouped_heads(found):
    def fn(x, k):
        q = heads(x.flatten(2).mT)
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    assert found(fn, (latents(), kv(6, h=1))) == [("cross", "no key is made from the tokens of q")]


def test_heads_that_are_no_groups(trace, apply):
    gm = trace(attend, (latents(), kv(6)))
    (call,) = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    call.kwargs = {"enable_gqa": True}
    call.args[1].meta["example_value"] = call.args[1].meta["example_value"].repeat(1, 2, 1, 1)
    apply(gm, TEXT)
    reason = "heads of q are no whole number of groups of the heads of k (enable_gqa)"
    assert [site.reason for _, site in sites(gm.graph)] == [reason]


def test_three_dimensional_operands(found):
    def fn(x):
        q = x.flatten(2).mT
        return F.scaled_dot_product_attention(q, q, q)

    reason = "q, k, v must be [B, H, L, D], got ranks [3, 3, 3]"
    assert found(fn, (latents(),)) == [("other", reason)]


def test_values_of_another_width(found):
    def fn(x, k):
        q = heads(x.flatten(2).mT)
        return F.scaled_dot_product_attention(q, k, k[..., :4])

    assert found(fn, (latents(), kv(64))) == [("other", "head dims of q and v differ")]


def test_keys_written_after_they_were_joined(found, grown):
    def fn(x, text, history):
        q = heads(x.flatten(2).mT)
        own = q * 2
        key = torch.cat([text, history, own], 2)
        own.mul_(2)
        return F.scaled_dot_product_attention(q, key, key)

    reason = "%mul_ writes to its keys or values in place"
    assert found(fn, *grown) == [("other", reason)]


def test_joined_keys_that_are_written(found, grown):
    def fn(x, text, history):
        q = heads(x.flatten(2).mT)
        key = torch.cat([text, history, q * 2], 2)
        key[:, :, 0] = 0
        return F.scaled_dot_product_attention(q, key, key)

    ((role, reason),) = found(fn, *grown)
    assert role == "other"
    assert reason.endswith("writes to its keys or values in place")


def test_keys_written_before_they_are_joined(found, grown):
    def fn(x, text, history):
        q = heads(x.flatten(2).mT)
        own = q * 2
        own.mul_(2)
        key = torch.cat([text, history, own], 2)
        return F.scaled_dot_product_attention(q, key, key)

    assert found(fn, *grown) == [("decode", "it has history keys")]


def test_history_of_another_dtype(found):
    def fn(x, text, history):
        q = heads(x.flatten(2).mT)
        key = torch.cat([text, history, q], 2)
        return F.scaled_dot_product_attention(q, key, key)

    args = [(latents(), kv(6), kv(16 * n).half()) for n in (HISTORY, HISTORY + 4)]
    reason = "its dtypes differ: torch.float16, torch.float32"
    assert found(fn, *args) == [("other", reason)]


def test_keys_that_are_broadcast(found):
    def fn(x, k):
        q = heads(x.flatten(2).mT).expand(3, -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, k)

    assert found(fn, (latents(), kv(64))) == [("other", "q and k differ in batch or heads")]


def test_cat_along_heads_is_no_segment(found):
    def fn(x, history):
        q = heads(x.flatten(2).mT)
        key = torch.cat([history, q], 1)
        q = torch.cat([q, q], 1)
        return F.scaled_dot_product_attention(q, key, key)

    ((role, _),) = found(fn, (latents(), kv(64)))
    assert role == "other"


def test_values_are_joined_more_coarsely_than_keys(found):
    def fn(x, text, history, w2c):
        q = heads(x.flatten(2).mT)
        key = torch.cat([text, history, q], 2)
        value = torch.cat([text, torch.cat([history, q], 2).relu()], 2)
        return F.scaled_dot_product_attention(q, key, value) * w2c.sum()

    args = (latents(), kv(6), kv(16 * HISTORY), torch.randn(1, HISTORY + 4, 4, 4))
    assert found(fn, args) == [("decode", "it has history keys")]


@pytest.mark.parametrize("turned", ["keys", "values", "both"])
def test_keys_are_joined_before_their_positions_and_values_are_not(apply, turned):
    def fn(x, history, w2c, table):
        q = heads(x.flatten(2).mT)
        key, value = torch.cat([history, q * 2], 2), torch.cat([history + 1, q * 3], 2)
        key = key * table if turned != "values" else key
        value = value * table if turned != "keys" else value
        return F.scaled_dot_product_attention(q, key, value) * w2c.mean()

    found = []

    def backend(gm, _):
        apply(gm, f"{TEXT},sparse-attention")
        found.extend(site for _, site in sites(gm.graph))
        return gm.forward

    compiled = torch.compile(fn, backend=backend)
    for n in (HISTORY, HISTORY + 4):
        tokens = 16 * (n + 4)
        w2c, table = torch.randn(1, n + 4, 4, 4), torch.randn(tokens, 8)
        args = (latents(), kv(16 * n), w2c, table)
        torch.testing.assert_close(compiled(*args), fn(*args))
    expected = "other" if turned == "both" else "decode"
    assert {site.role for site in found} == {expected}, [site.reason for site in found]


def test_values_in_another_order(found):
    def fn(x, text, history):
        q = heads(x.flatten(2).mT)
        key, value = torch.cat([text, history, q], 2), torch.cat([history, text, q], 2)
        return F.scaled_dot_product_attention(q, key, value)

    args = (latents(), kv(6), kv(16 * HISTORY))
    assert found(fn, args) == [("other", "pieces 0 of k and v differ in length")]
