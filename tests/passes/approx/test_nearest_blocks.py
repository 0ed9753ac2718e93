# ruff: noqa: E501  (goldens: one line is one node)
import pytest
import torch
from expecttest import assert_expected_inline

import lipass
from lipass.kernels import registry
from lipass.kernels.nearest import order
from lipass.passes.core import PassPipeline
from lipass.passes.graph.marks import invariants

SPARSE = "canonicalize,find-attention,find-poses,find-steps,sparse-attention{tile=1x4x4 budget_decode=0.25 sink_latents=1}"
TEXT = SPARSE + ",nearest-blocks{choose=buckets axes=4 query_block=8}"


def said(records):
    return {(note.action, note.reason) for note in records[-1].notes}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TEXT.replace("budget_decode=0.25", ""), "every block of its history is visited"),
        (TEXT.replace("budget", "ranking=cosine budget"), "its blocks are chosen by cosine"),
    ],
)
def test_blocks_that_are_chosen_otherwise_stay(trace, apply, mini, inputs, text, reason):
    records, _ = apply(trace(mini, inputs(4).decode), text)
    assert not records[-1].changed
    assert said(records) == {("kept", f"2 calls: {reason}")}


def test_means_are_the_default(trace, apply, mini, inputs):
    records, _ = apply(trace(mini, inputs(4).decode), SPARSE + ",nearest-blocks")
    assert not records[-1].changed
    assert not records[-1].notes


def test_prefill_has_no_history(trace, apply, mini, inputs):
    records, _ = apply(trace(mini, inputs(4).prefill), TEXT)
    assert not records[-1].changed
    assert not records[-1].notes


def in_place(mini, given):
    """Decode, then write to the history that was read."""
    out = mini(*given)
    for k, _ in given[4]:
        k.mul_(2)
    return out


def test_keys_that_are_written_to_stay(trace, apply, mini, inputs):
    records, _ = apply(trace(lambda *given: in_place(mini, given), inputs(4).decode), TEXT)
    assert not records[-1].changed
    why = "its history is written to, so that no order of it can be kept"
    assert said(records) == {("kept", f"2 calls: {why}")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("choose=trees", "choose must be one of means, buckets, got 'trees'"),
        ("axes=0", r"axes must be in \[1, 16\], got 0; use 8"),
        ("query_block=0", "query_block must be >= 1, got 0; use 32"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PassPipeline.parse(f"{SPARSE},nearest-blocks{{{options}}}")


def test_decode(trace, apply, mini, inputs):
    records, _ = apply(trace(mini, inputs(4).decode, inputs(8).decode), TEXT)
    assert_expected_inline(
        records[-1].diff,
        """\
+%key_basis_default_1: f32[1, 2, 16, 4] = lipass.key_basis($history_1_0, 4, 0, 16)  # blocks.1
+%key_order_default_1: i32[1, 2, n2] = lipass.key_order($history_1_0, %key_basis_default_1, 16, 16)
+%pool_in_order_default_1: f32[1, 2, ((n2 + 15)//16), 16] = lipass.pool_in_order($history_1_0, %key_order_default_1, 16)
+%key_basis_default: f32[1, 2, 16, 4] = lipass.key_basis($history_0_0, 4, 0, 16)  # blocks.0
+%key_order_default: i32[1, 2, n1] = lipass.key_order($history_0_0, %key_basis_default, 16, 16)
+%pool_in_order_default: f32[1, 2, ((n1 + 15)//16), 16] = lipass.pool_in_order($history_0_0, %key_order_default, 16)
-%sparse_attention_default: f32[1, 2, 64, 16] = lipass.sparse_attention(%q, [$text_0_0, $history_0_0, %k], [$text_0_1, $history_0_1, %v], [4, 4, 4], [1, 1, 6, %floordiv, 4, 4, 4, 4, 4], 'text,history,current', [1, 4, 4], 0.25, 0.25, 1, 'decode', None, 'blocks.0:decode')  # blocks.0
+%sparse_attention_default: f32[1, 2, 64, 16] = lipass.sparse_attention(%q, [$text_0_0, $history_0_0, %k], [$text_0_1, $history_0_1, %v], [4, 4, 4], [1, 1, 6, %floordiv, 4, 4, 4, 4, 4], 'text,history,current', [1, 4, 4, 1, 2, 4], 0.25, 0.25, 1, 'decode', None, 'blocks.0:decode', history_means=%pool_in_order_default, planner='buckets', history_order=%key_order_default, history_basis=%key_basis_default)  # blocks.0
-%sparse_attention_default_1: f32[1, 2, 64, 16] = lipass.sparse_attention(%q_1, [$text_1_0, $history_1_0, %k_1], [$text_1_1, $history_1_1, %v_1], [4, 4, 4], [1, 1, 6, %floordiv_1, 4, 4, 4, 4, 4], 'text,history,current', [1, 4, 4], 0.25, 0.25, 1, 'decode', None, 'blocks.1:decode')  # blocks.1
+%sparse_attention_default_1: f32[1, 2, 64, 16] = lipass.sparse_attention(%q_1, [$text_1_0, $history_1_0, %k_1], [$text_1_1, $history_1_1, %v_1], [4, 4, 4], [1, 1, 6, %floordiv_1, 4, 4, 4, 4, 4], 'text,history,current', [1, 4, 4, 1, 2, 4], 0.25, 0.25, 1, 'decode', None, 'blocks.1:decode', history_means=%pool_in_order_default_1, planner='buckets', history_order=%key_order_default_1, history_basis=%key_basis_default_1)  # blocks.1
""",
    )


def test_means_of_the_order_take_the_place_of_those_of_the_grid(trace, apply, mini, inputs):
    text = TEXT + ",pool-history{numbers_min=0}"
    records, _ = apply(trace(mini, inputs(4).decode), text)
    assert said(records) == {("kept", "2 calls: its blocks are chosen by no means")}


def test_unrolled_loop_sorts_in_front_of_its_steps(trace, apply, mini, inputs):
    gm = trace(mini.chunk, inputs(4).chunk)
    apply(gm, TEXT + ",guard-steps")
    sorts = gm.graph.find_nodes(op="call_function", target=torch.ops.lipass.key_order.default)
    (step,) = {gm.get_submodule(str(n.target)) for n in gm.graph.find_nodes(op="call_module")}
    assert len(sorts) == len(mini.blocks)
    assert "key_order(" not in step.code


def test_what_depends_on_the_keys_is_outlined_for_the_session(trace, apply, mini, inputs):
    gm = trace(mini, inputs(4).decode, inputs(8).decode)
    apply(gm, TEXT + ",hoist-calls{work_min=1024}")
    bodies = [gm.get_submodule(call.target) for call in invariants(gm.graph)]
    assert len(bodies) == len(mini.blocks)
    for name in ("key_basis", "key_order", "pool_in_order"):
        assert all(name in body.code for body in bodies)


OPTIONS = {
    "preset": "sparse", "inner": "eager", "sparse.choose": "buckets", "sparse.dense_tokens": 0,
    "sparse.tile": (1, 4, 4), "sparse.budget_decode": 0.25, "nearest-blocks.query_block": 8,
}  # fmt: skip


def compiled(mini, **options):
    return torch.compile(mini, backend="light_interaction", options=OPTIONS | options)


@pytest.mark.usefixtures("fresh_dynamo")
def test_session_sorts_once_a_chunk(mini, inputs, monkeypatch):
    sorted_lengths, real = [], order.sort_by_halves
    monkeypatch.setattr(order.native, "why_not_loaded", lambda: "not built")

    def count(at, first, block):
        sorted_lengths.append(first + at.shape[2])
        return real(at, first, block)

    monkeypatch.setattr(order, "sort_by_halves", count)
    fast = compiled(mini, **{"hoist-calls.work_min": 1024})
    chunks = inputs(8), inputs(12)
    with torch.no_grad():
        fast(*chunks[0].decode)  # compiles, and times what sorting takes
    sorted_lengths.clear()
    with torch.no_grad(), lipass.Session(preset="sparse"), registry.force("sparse"):
        for chunk in chunks:
            for _ in range(4):
                fast(torch.randn_like(chunk.noise), *chunk.decode[1:])
    of_keys = [length for length in sorted_lengths if length > 64]
    assert of_keys == [n * 16 for n in (8, 12) for _ in mini.blocks]
    assert sorted_lengths.count(64) == 2 * 4 * len(mini.blocks)


@pytest.mark.usefixtures("fresh_dynamo")
def test_budget_that_leaves_nothing_out_equals_dense(mini, inputs):
    args = inputs(8).decode
    fast = compiled(mini, **{"sparse.budget_decode": 0.999})
    with torch.no_grad(), registry.force("sparse"):
        torch.testing.assert_close(fast(*args), mini(*args), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
def test_latents_that_cameras_leave_out_are_left_out_of_the_order(mini, inputs):
    """With all that is kept visited, blocks of either kind are dense attention over it."""
    args = inputs(8).decode
    options = {"preset": "all", "sparse.budget_decode": 0.999, "context.window_chunks_max": 1}
    outputs = []
    for choose in ("means", "buckets"):
        registry.reset_telemetry()
        fast = compiled(mini, **options, **{"sparse.choose": choose})
        with torch.no_grad(), registry.force("sparse"):
            outputs.append(fast(*args))
        assert sum(site.dropped_latents for site in registry.telemetry().values()) > 0
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
def test_short_histories_stay_dense_as_sorting_them_counts(mini, inputs):
    registry.reset_telemetry()
    with torch.no_grad():
        compiled(mini)(*inputs(8).decode)
    for site in registry.telemetry().values():
        assert site.dense_calls == 1
        assert site.reason.startswith("predicted ")


@pytest.mark.usefixtures("fresh_dynamo")
def test_steps_that_are_reused_answer_for_sorted_keys_too(mini, inputs):
    given = inputs(8)
    options = {"steps": True, "steps.form": "lookup", "steps.overlap_min": 0.0}
    fast = compiled(mini, **options)
    registry.reset_telemetry()
    session = lipass.Session(preset="cache", **options)
    with torch.no_grad(), registry.force("sparse"), session:
        chunk = session.chunk(poses=given.w2c[0, :8], query=given.w2c[0, 8:])
        with chunk:
            for step in chunk.steps([1.0, 0.9, 0.6, 0.0]):
                level = torch.full((1, 4), float(step.sigma))
                fast(given.noise, level, *given.decode[2:])
    assert chunk.lookups == 1
    assert {site.calls for site in registry.telemetry().values()} == {2}
