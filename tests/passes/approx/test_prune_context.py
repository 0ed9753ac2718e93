# ruff: noqa: E501  (goldens: one line is one node)
import pytest
import torch
from expecttest import assert_expected_inline

import lipass

FACTS = "canonicalize,find-attention,find-poses"
TEXT = f"{FACTS},prune-context{{overlap_min=0.3 sink_latents=1 window_latents=2 tile=1x4x4}}"


def test_decode(trace, apply, mini, inputs):
    records, _ = apply(trace(mini, inputs(4).decode, inputs(8).decode), TEXT)
    assert_expected_inline(
        records[-1].diff,
        """\
+%sub_1: n0 - 4 = sub($n0, 4)
+%getitem_14: f32[1, n0 - 4, 4, 4] = getitem($w2c, (:, :%sub_1))
+%getitem_15: f32[1, 4, 4, 4] = getitem($w2c, (:, %sub_1:))
+%view_overlap_default: f32[1, n0 - 4] = lipass.view_overlap(%getitem_15, %getitem_14, 60.0, 35.0, 0.5, 8.0)
+%arange: i64[n0 - 4] = arange(%sub_1, device=device(type='cpu'))
+%sub_2: n0 - 6 = sub(%sub_1, 2)
+%ge: b8[n0 - 4] = ge(%arange, %sub_2)
+%lt: b8[n0 - 4] = lt(%arange, 1)
+%ge_1: b8[1, n0 - 4] = ge(%view_overlap_default, 0.3)
+%or_: b8[n0 - 4] = or_(%ge, %lt)
+%or__1: b8[1, n0 - 4] = or_(%ge_1, %or_)
-%key: f32[1, 2, n1 + 70, 16] = cat([$text_0_0, $history_0_0, %k], 2)  # blocks.0
-%value: f32[1, 2, n1 + 70, 16] = cat([$text_0_1, $history_0_1, %v], 2)  # blocks.0
-%out: f32[1, 2, 64, 16] = scaled_dot_product_attention(%q, %key, %value)  # blocks.0
-%transpose: f32[1, 64, 2, 16] = %out.transpose(1, 2)  # blocks.0
+%sym_size_int: n1 = aten.sym_size($history_0_0, 2)  # blocks.0
+%floordiv: (n1//16) = floordiv(%sym_size_int, 16)  # blocks.0
+%sparse_attention_default: f32[1, 2, 64, 16] = lipass.sparse_attention(%q, [$text_0_0, $history_0_0, %k], [$text_0_1, $history_0_1, %v], [4, 4, 4], [1, 1, 6, %floordiv, 4, 4, 4, 4, 4], 'text,history,current', [1, 4, 4], 1.0, 0.25, 1, 'decode', %or__1, 'blocks.0:decode')  # blocks.0
+%transpose: f32[1, 64, 2, 16] = %sparse_attention_default.transpose(1, 2)  # blocks.0
-%key_1: f32[1, 2, n2 + 70, 16] = cat([$text_1_0, $history_1_0, %k_1], 2)  # blocks.1
-%value_1: f32[1, 2, n2 + 70, 16] = cat([$text_1_1, $history_1_1, %v_1], 2)  # blocks.1
-%out_1: f32[1, 2, 64, 16] = scaled_dot_product_attention(%q_1, %key_1, %value_1)  # blocks.1
-%transpose_1: f32[1, 64, 2, 16] = %out_1.transpose(1, 2)  # blocks.1
+%sym_size_int_1: n2 = aten.sym_size($history_1_0, 2)  # blocks.1
+%floordiv_1: (n2//16) = floordiv(%sym_size_int_1, 16)  # blocks.1
+%sparse_attention_default_1: f32[1, 2, 64, 16] = lipass.sparse_attention(%q_1, [$text_1_0, $history_1_0, %k_1], [$text_1_1, $history_1_1, %v_1], [4, 4, 4], [1, 1, 6, %floordiv_1, 4, 4, 4, 4, 4], 'text,history,current', [1, 4, 4], 1.0, 0.25, 1, 'decode', %or__1, 'blocks.1:decode')  # blocks.1
+%transpose_1: f32[1, 64, 2, 16] = %sparse_attention_default_1.transpose(1, 2)  # blocks.1
""",
    )


def test_prefill(trace, apply, mini, inputs):
    anew = TEXT.replace("}", " prefill_each_chunk=true}")
    records, _ = apply(trace(mini, inputs(4).prefill), anew)
    assert_expected_inline(
        records[-1].diff,
        """\
+%getitem_10: f32[1, 4, 4, 4] = getitem($w2c, (:, :4))
+%getitem_11: f32[1, 4, 4, 4] = getitem($w2c, (:, 4:))
+%view_overlap_default: f32[1, 4] = lipass.view_overlap(%getitem_11, %getitem_10, 60.0, 35.0, 0.5, 8.0)
+%arange: i64[4] = arange(4, device=device(type='cpu'))
+%ge: b8[4] = ge(%arange, 2)
+%lt: b8[4] = lt(%arange, 1)
+%ge_1: b8[1, 4] = ge(%view_overlap_default, 0.3)
+%or_: b8[4] = or_(%ge, %lt)
+%or__1: b8[1, 4] = or_(%ge_1, %or_)
-%key: f32[1, 2, 70, 16] = cat([$text_0_0, %k], 2)  # blocks.0
-%value: f32[1, 2, 70, 16] = cat([$text_0_1, %v], 2)  # blocks.0
-%out: f32[1, 2, 64, 16] = scaled_dot_product_attention(%q, %key, %value)  # blocks.0
-%transpose: f32[1, 64, 2, 16] = %out.transpose(1, 2)  # blocks.0
+%sparse_attention_default: f32[1, 2, 64, 16] = lipass.sparse_attention(%q, [$text_0_0, %k], [$text_0_1, %v], [4, 4, 4], [1, 1, 6, 4, 4, 4], 'text,current', [1, 4, 4], 1.0, 0.25, 1, 'prefill', %or__1, 'blocks.0:prefill')  # blocks.0
+%transpose: f32[1, 64, 2, 16] = %sparse_attention_default.transpose(1, 2)  # blocks.0
""",
    )


def test_mask_is_computed_once_for_a_whole_chunk(trace, apply, mini, inputs):
    gm = trace(mini.chunk, inputs(4).chunk)
    apply(gm, TEXT)
    assert (
        len(gm.graph.find_nodes(op="call_function", target=torch.ops.lipass.view_overlap.default))
        == 1
    )
    calls = gm.graph.find_nodes(
        op="call_function", target=torch.ops.lipass.sparse_attention.default
    )
    assert len({call.args[11] for call in calls}) == 1
    assert len(calls) == 7


def test_sparse_attention_behind_it_sets_tile_budget_and_sink(trace, apply, mini, inputs):
    gm = trace(mini, inputs(4).decode)
    apply(gm, f"{TEXT},sparse-attention{{tile=2x2x2 budget_decode=0.5 sink_latents=2}}")
    call, _ = gm.graph.find_nodes(
        op="call_function", target=torch.ops.lipass.sparse_attention.default
    )
    assert (call.args[6], call.args[7], call.args[9]) == ([2, 2, 2], 0.5, 2)
    assert call.args[11] is not None


@pytest.mark.parametrize(
    ("window", "kept"), [(1, [1, 0, 0, 1]), (2, [1, 0, 1, 1])], ids=["window1", "window2"]
)
def test_mask_holds_sink_and_window_where_nothing_is_seen(
    trace, apply, mini, inputs, window, kept
):
    item = inputs(4)
    half_turn = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    item.w2c[:, :4] = half_turn
    assert mask(trace, apply, mini, item, window) == kept


def test_mask_holds_what_shows_the_new_view(trace, apply, mini, inputs):
    item = inputs(4)
    half_turn = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    item.w2c[:] = torch.eye(4)
    item.w2c[:, [1, 3]] = half_turn
    assert mask(trace, apply, mini, item, 0) == [1, 0, 1, 0]


def test_streams_stacked_on_the_batch_share_one_set_of_cameras(trace, apply):
    def decode(x, keys, values, w2c):
        q = x.flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)
        q = torch.cat([q, q.flip(-1)])
        k, v = torch.cat([keys, q * 2], 2), torch.cat([values, q * 3], 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) * w2c.sum()

    def given(n):
        keys = torch.randn(2, 2, 2, 16 * n, 8)
        return torch.randn(1, 16, 4, 4, 4), *keys, torch.randn(1, n + 4, 4, 4)

    gm = trace(decode, given(4), given(6))
    apply(gm, TEXT)
    (call,) = gm.graph.find_nodes(
        op="call_function", target=torch.ops.lipass.sparse_attention.default
    )
    assert call.args[11].meta["example_value"].shape[0] == 2


def mask(trace, apply, mini, item, window):
    """Run decode and return the mask that the attention was given."""
    gm = trace(mini, item.decode)
    apply(gm, f"{FACTS},prune-context{{sink_latents=1 window_latents={window}}}")
    call = gm.graph.find_nodes(
        op="call_function", target=torch.ops.lipass.sparse_attention.default
    )[0]
    gm.graph.output_node().args = ((call.args[11],),)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    compiled = torch.compile(mini, backend=lambda _, __: gm.forward, dynamic=False)
    with torch.no_grad():
        return compiled(*item.decode)[0].int().tolist()


def test_history_that_is_all_sink_and_window(notes, mini, inputs):
    text = f"{FACTS},prune-context{{sink_latents=1 window_latents=3}}"
    reason = "all 4 latents are sink 1 and window 3"
    assert notes(mini, inputs(4).decode, text) == [("context", "kept", reason)]


def test_prefill_whose_keys_may_be_read_for_another_view(notes, mini, inputs):
    ((site, action, reason),) = notes(mini, inputs(4).prefill, TEXT)
    assert (site, action) == ("blocks.0:prefill", "kept")
    assert reason.startswith("keys of dropped latents would be wrong later: its keys are returned")


def test_prefill_that_writes_a_cache(notes, mini, inputs):
    item = inputs(4)
    caches = [torch.zeros_like(x) for pair in item.history for x in pair]

    def prefill(context, clean, w2c, text, caches):
        made = [x for pair in mini(context, clean, w2c, text) for x in pair]
        for cache, new in zip(caches, made, strict=True):
            cache.copy_(new)

    (_, action, reason), *_ = notes(prefill, (*item.prefill, caches), TEXT)
    assert action == "kept"
    assert "its keys are written to %l_caches_0_" in reason


def in_front(x, text, w2c):
    q = x.flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)
    key, own = q * 2, q * 3
    k, v = torch.cat([key, text], 2), torch.cat([own, text + 1], 2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v) * w2c.sum(), key, own


def planted(x, text, w2c, heads=2):
    q = x.flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)
    key, own = q[:, :heads] * 2, q[:, :heads] * 3
    runs = [("current", key, own, (6, 4, 4)), ("text", text[:, :heads], text[:, :heads] + 1, None)]
    return lipass.attend(q, runs, site="own") * w2c.sum(), key, own


def planted_for_groups(x, text, w2c):
    return planted(x, text, w2c, heads=1)


@pytest.mark.parametrize("prefill", [in_front, planted, planted_for_groups])
def test_prefill_whose_keys_lie_in_front_of_text(notes, prefill):
    given = torch.randn(1, 16, 6, 4, 4), torch.randn(1, 2, 5, 8), torch.eye(4).repeat(1, 8, 1, 1)
    ((_, action, reason),) = notes(prefill, given, TEXT)
    assert action == "kept"
    assert reason.startswith("keys of dropped latents would be wrong later: its keys are returned")


def test_graph_without_cameras(notes):
    reason = "the graph has no cameras and no decode site"
    assert notes(lambda x: x + 1, (torch.randn(3),), TEXT) == [("context", "kept", reason)]
