# ruff: noqa: E501  (goldens: one line is one node)
import pytest
import torch
from expecttest import assert_expected_inline

import lipass
from lipass.kernels.pool.api import pool_blocks
from lipass.passes.graph.marks import invariants

SPARSE = "canonicalize,find-attention,find-poses,find-steps,sparse-attention{tile=1x4x4 budget_decode=0.25}"
TEXT = SPARSE + ",pool-history{numbers_min=0}"


def said(records):
    return {(note.action, note.reason) for note in records[-1].notes}


def test_decode(trace, apply, mini, inputs):
    records, _ = apply(trace(mini, inputs(4).decode, inputs(8).decode), TEXT)
    assert_expected_inline(
        records[-1].diff,
        """\
+%sym_size_int_2: n1 = aten.sym_size($history_0_0, 2)
+%floordiv_2: (n1//16) = floordiv(%sym_size_int_2, 16)
+%pool_blocks_default: f32[1, 2, (n1//16), 16] = lipass.pool_blocks($history_0_0, [%floordiv_2, 4, 4], [1, 4, 4])
+%sym_size_int_3: n2 = aten.sym_size($history_1_0, 2)
+%floordiv_3: (n2//16) = floordiv(%sym_size_int_3, 16)
+%pool_blocks_default_1: f32[1, 2, (n2//16), 16] = lipass.pool_blocks($history_1_0, [%floordiv_3, 4, 4], [1, 4, 4])
-%sparse_attention_default: f32[1, 2, 64, 16] = lipass.sparse_attention(%q, [$text_0_0, $history_0_0, %k], [$text_0_1, $history_0_1, %v], [4, 4, 4], [1, 1, 6, %floordiv, 4, 4, 4, 4, 4], 'text,history,current', [1, 4, 4], 0.25, 0.25, 0, 'decode', None, 'blocks.0:decode')  # blocks.0
+%sparse_attention_default: f32[1, 2, 64, 16] = lipass.sparse_attention(%q, [$text_0_0, $history_0_0, %k], [$text_0_1, $history_0_1, %v], [4, 4, 4], [1, 1, 6, %floordiv, 4, 4, 4, 4, 4], 'text,history,current', [1, 4, 4], 0.25, 0.25, 0, 'decode', None, 'blocks.0:decode', history_means=%pool_blocks_default)  # blocks.0
-%sparse_attention_default_1: f32[1, 2, 64, 16] = lipass.sparse_attention(%q_1, [$text_1_0, $history_1_0, %k_1], [$text_1_1, $history_1_1, %v_1], [4, 4, 4], [1, 1, 6, %floordiv_1, 4, 4, 4, 4, 4], 'text,history,current', [1, 4, 4], 0.25, 0.25, 0, 'decode', None, 'blocks.1:decode')  # blocks.1
+%sparse_attention_default_1: f32[1, 2, 64, 16] = lipass.sparse_attention(%q_1, [$text_1_0, $history_1_0, %k_1], [$text_1_1, $history_1_1, %v_1], [4, 4, 4], [1, 1, 6, %floordiv_1, 4, 4, 4, 4, 4], 'text,history,current', [1, 4, 4], 0.25, 0.25, 0, 'decode', None, 'blocks.1:decode', history_means=%pool_blocks_default_1)  # blocks.1
""",
    )


def test_sites_stay_rewritten(trace, apply, mini, inputs):
    """Where means are computed is no reason to call a site dense, in a report or under `strict`."""
    for text in (TEXT, SPARSE + ",pool-history"):
        records, _ = apply(trace(mini, inputs(4).decode), text)
        assert {note.site for note in records[-1].notes} == {"history"}


def test_unrolled_loop_pools_in_front_of_its_steps(trace, apply, mini, inputs):
    gm = trace(mini.chunk, inputs(4).chunk)
    apply(gm, TEXT + ",guard-steps")
    pooled = gm.graph.find_nodes(op="call_function", target=torch.ops.lipass.pool_blocks.default)
    (step,) = {gm.get_submodule(str(n.target)) for n in gm.graph.find_nodes(op="call_module")}
    assert len(pooled) == len(mini.blocks)
    assert "pool_blocks(" not in step.code


def test_means_are_outlined_for_the_session(trace, apply, mini, inputs):
    gm = trace(mini, inputs(4).decode, inputs(8).decode)
    apply(gm, TEXT + ",hoist-calls{work_min=1024}")
    bodies = [gm.get_submodule(call.target) for call in invariants(gm.graph)]
    assert len(bodies) == len(mini.blocks)
    assert all("pool_blocks" in body.code for body in bodies)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SPARSE + ",pool-history", "its history holds less than 4194304 numbers"),
        (TEXT.replace("budget_decode=0.25", ""), "every block of its history is visited"),
    ],
)
def test_what_does_not_pay_stays(trace, apply, mini, inputs, text, reason):
    records, _ = apply(trace(mini, inputs(4).decode), text)
    assert not records[-1].changed
    assert said(records) == {("kept", f"2 calls: {reason}")}


def computed(mini, given):
    """Decode with a history that is made anew of the one that is given."""
    return mini(*given[:4], [(k * 1.0, v) for k, v in given[4]])


def in_place(mini, given):
    """Decode, then write to the history that was read."""
    out = mini(*given)
    for k, _ in given[4]:
        k.mul_(2)
    return out


@pytest.mark.parametrize(
    ("fn", "reason"),
    [(computed, "its history is computed in each call"), (in_place, "its history is written to")],
)
def test_keys_that_are_not_the_same_in_each_call_stay(trace, apply, mini, inputs, fn, reason):
    records, _ = apply(trace(lambda *given: fn(mini, given), inputs(4).decode), TEXT)
    assert not records[-1].changed
    assert said(records) == {("kept", f"2 calls: {reason}")}


def test_prefill_has_no_history(trace, apply, mini, inputs):
    records, _ = apply(trace(mini, inputs(4).prefill), TEXT)
    assert not records[-1].changed
    assert not records[-1].notes


@pytest.mark.usefixtures("fresh_dynamo")
def test_session_pools_once_a_chunk(mini, inputs, monkeypatch):
    options = {"preset": "sparse", "inner": "eager", "disable": ["share-blocks"]}
    pipeline = f"{TEXT},hoist-calls{{work_min=1024}}"
    pooled = []

    def count(x, grid):
        pooled.append(grid.grid)
        return pool_blocks(x, grid)

    monkeypatch.setattr("lipass.kernels.ops.pool_blocks", count)
    fast = torch.compile(
        mini, backend="light_interaction", options=options | {"pipeline": pipeline}
    )
    plain = torch.compile(
        mini, backend="light_interaction", options=options | {"pipeline": SPARSE}
    )
    chunks = inputs(8), inputs(12)
    with torch.no_grad(), lipass.Session(preset="sparse"):
        for chunk in chunks:
            for _ in range(4):
                noise = torch.randn_like(chunk.noise)
                args = (noise, *chunk.decode[1:])
                torch.testing.assert_close(fast(*args), plain(*args), atol=0, rtol=0)
    assert pooled == [(n, 4, 4) for n in (8, 12) for _ in mini.blocks]
