# ruff: noqa: E501  (goldens: one line is one node)
import pytest
import torch
from attending import heads, kv, latents
from expecttest import assert_expected_inline
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lipass
from lipass.passes.core import PassPipeline

FIND = "canonicalize,find-attention,"
TEXT = FIND + "merge-history"
OPTIONS = "{threshold=0.9 kv_tokens=256 sink_latents=1}"


def test_decode(trace, apply, mini, inputs):
    records, _ = apply(trace(mini, inputs(4).decode, inputs(8).decode), TEXT + OPTIONS)
    assert_expected_inline(
        records[-1].diff,
        """\
-%key: f32[1, 2, n1 + 70, 16] = cat([$text_0_0, $history_0_0, %k], 2)  # blocks.0
-%value: f32[1, 2, n1 + 70, 16] = cat([$text_0_1, $history_0_1, %v], 2)  # blocks.0
-%out: f32[1, 2, 64, 16] = scaled_dot_product_attention(%q, %key, %value)  # blocks.0
-%transpose: f32[1, 64, 2, 16] = %out.transpose(1, 2)  # blocks.0
+%attend_merged_default: f32[1, 2, 64, 16] = lipass.attend_merged(%q, [$text_0_0, $history_0_0, %k], [$text_0_1, $history_0_1, %v], 1, 16, 0.25, 0.9, 256, 1, 'blocks.0:decode')  # blocks.0
+%transpose: f32[1, 64, 2, 16] = %attend_merged_default.transpose(1, 2)  # blocks.0
-%key_1: f32[1, 2, n2 + 70, 16] = cat([$text_1_0, $history_1_0, %k_1], 2)  # blocks.1
-%value_1: f32[1, 2, n2 + 70, 16] = cat([$text_1_1, $history_1_1, %v_1], 2)  # blocks.1
-%out_1: f32[1, 2, 64, 16] = scaled_dot_product_attention(%q_1, %key_1, %value_1)  # blocks.1
-%transpose_1: f32[1, 64, 2, 16] = %out_1.transpose(1, 2)  # blocks.1
+%attend_merged_default_1: f32[1, 2, 64, 16] = lipass.attend_merged(%q_1, [$text_1_0, $history_1_0, %k_1], [$text_1_1, $history_1_1, %v_1], 1, 16, 0.25, 0.9, 256, 1, 'blocks.1:decode')  # blocks.1
+%transpose_1: f32[1, 64, 2, 16] = %attend_merged_default_1.transpose(1, 2)  # blocks.1
""",
    )


def test_sites_without_a_history_are_kept(notes, mini, inputs):
    assert notes(mini, inputs(4).prefill, TEXT)[0] == (
        "blocks.0:prefill", "kept", "prefill: its keys are returned",
    )  # fmt: skip


def attend(x, text, history, *, of_history=lambda t: t, mask=None):
    q = heads(x.flatten(2).mT)
    key = torch.cat([text, of_history(history), q * 2], 2)
    value = torch.cat([text + 1, of_history(history) + 1, q * 3], 2)
    return F.scaled_dot_product_attention(q, key, value, attn_mask=mask)


def kept(notes, fn, grown=True):
    args, longer = ((latents(), kv(5), kv(16 * n)) for n in (4, 8))
    (site,) = notes(fn, args, TEXT, longer if grown else None)
    assert site[1] == "kept"
    return site[2]


def test_plain_history_is_merged(notes):
    args, longer = ((latents(), kv(5), kv(16 * n)) for n in (4, 8))
    assert notes(attend, args, TEXT, longer) == [
        ("attention:decode", "rewritten", "decode, history merged at 1")
    ]


def test_history_that_the_graph_computes_is_kept(apply, trace, mini, inputs):
    """As in a graph that holds prefill and the loop of steps."""
    _, ctx = apply(trace(mini.chunk, inputs(4).chunk), TEXT)
    reasons = {note.reason for note in ctx.notes if note.site.endswith(":decode")}
    assert reasons >= {"its history is computed in the graph, and is another in each call"}
    assert "rewritten" not in {note.action for note in ctx.notes}


def test_mask_is_kept(notes):
    def fn(x, text, history):
        return attend(x, text, history, mask=text.new_ones(1, 1, 1, 133) > 0)

    assert "mask" in kept(notes, fn, grown=False)


def test_gradient_that_is_recorded_is_kept(apply, trace):
    def fn(x, text, history):
        with torch.enable_grad():
            return attend(x.requires_grad_(), text, history)

    _, ctx = apply(trace(fn, (latents(), kv(5), kv(64)), (latents(), kv(5), kv(128))), TEXT)
    assert "gradient is recorded" in ctx.notes[-1].reason


def test_kernel_that_the_user_chose_is_kept(notes):
    def fn(x, text, history):
        with sdpa_kernel(SDPBackend.MATH):
            return attend(x, text, history)

    assert "kernel" in kept(notes, fn)


def test_positions_that_keys_are_given_in_each_call_are_kept(notes):
    """Of `rope(cat([history, current]))` no key is what it was when positions move on."""

    def fn(x, text, history):
        q = heads(x.flatten(2).mT)
        key = torch.cat([history, q * 2], 2)
        turns = torch.arange(key.shape[2], dtype=torch.float32)[:, None]
        key = key * turns.cos() + key.flip(-1) * turns.sin()
        return F.scaled_dot_product_attention(q, key, torch.cat([history + 1, q * 3], 2))

    assert kept(notes, fn) == (
        "its keys are given positions in each call, so that none stays what it was"
    )


def test_what_lipass_attend_has_planted_is_kept(apply, trace):
    def fn(x, history):
        q = heads(x.flatten(2).mT)
        runs = [("history", history, history, (4, 4)), ("current", q, q, (4, 4))]
        return lipass.attend(q, runs, site="own")

    _, ctx = apply(trace(fn, (latents(), kv(64))), TEXT)
    assert ctx.notes[-1].reason == "lipass.attend chooses what it reads"


def test_merged_site_is_neither_pruned_nor_made_sparse(trace, apply, mini, inputs):
    text = f"{FIND}find-poses,merge-history,prune-context{{sink_latents=0 window_latents=1}},sparse-attention{{budget_decode=0.3}}"
    gm = trace(mini, inputs(4).decode, inputs(8).decode)
    records, _ = apply(gm, text)
    reasons = {note.reason for run in records[-2:] for note in run.notes}
    assert reasons == {"its history is merged"}
    assert "attend_merged" in gm.code
    assert "sparse_attention" not in gm.code


@pytest.mark.parametrize(
    "late", ["prune-context", "sparse-attention", "attend-pieces", "share-blocks"]
)
def test_what_decides_about_whole_histories_comes_later(late):
    before = f"{FIND}find-poses,find-steps,{late}"
    with pytest.raises(ValueError, match="merge-history must come before"):
        PassPipeline.parse(f"{before},merge-history")
