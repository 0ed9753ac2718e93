# ruff: noqa: E501  (goldens: one line is one node)
import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F

from lipass.kernels import calibration, prepare
from lipass.kernels.calibration import Form, Rates
from lipass.passes.core import PassContext, PassPipeline
from lipass.passes.runner import run_pipeline

TEXT = "canonicalize,find-attention,attend-pieces"


NO_KERNEL = prepare()
pytestmark = pytest.mark.skipif(bool(NO_KERNEL), reason=NO_KERNEL)
SLOW, FAST = Form(1.0, 1e3, 1e3), Form(0.0, 1e9, 1e9)


@pytest.fixture(autouse=True)
def _pays(monkeypatch):
    """Let no case depend on how fast this machine is."""
    rates = Rates(joined=SLOW, apart=FAST, sparse=FAST)
    monkeypatch.setattr(calibration, "cpu_rates", lambda dtype, dim, threads: rates)


def heads(*tokens, dim=8, heads=2):
    return [torch.randn(1, heads, n, dim) for n in tokens]


def attend(q, *parts):
    k = torch.cat([part * 2 for part in parts], 2)
    v = torch.cat([part + 1 for part in parts], 2)
    return F.scaled_dot_product_attention(q, k, v)


def reasons(records):
    return [note.reason for note in records[-1].notes if note.action == "kept"]


def test_joined_keys_are_read_in_pieces(trace, apply):
    records, _ = apply(trace(attend, heads(4, 6, 4)), TEXT)
    assert_expected_inline(
        records[-1].diff,
        """\
-%k: f32[1, 2, 10, 8] = cat([%mul, %mul_1], 2)
-%v: f32[1, 2, 10, 8] = cat([%add, %add_1], 2)
-%scaled_dot_product_attention: f32[1, 2, 4, 8] = scaled_dot_product_attention($q, %k, %v)
-return (%scaled_dot_product_attention)
+%attend_pieces_default: f32[1, 2, 4, 8] = lipass.attend_pieces($q, [%mul, %mul_1], [%add, %add_1], 0.3535533905932738, 'attention')
+return (%attend_pieces_default)
""",
    )


def test_output_is_that_of_the_function():
    torch._dynamo.reset()
    options = {"pipeline": TEXT, "inner": "aot_eager"}
    fast = torch.compile(attend, backend="light_interaction", options=options)
    args = heads(40, 6, 300, 4)
    with torch.no_grad():
        torch.testing.assert_close(fast(*args), attend(*args), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def masked(q, a, b):
    k = torch.cat([a, b], 2)
    return F.scaled_dot_product_attention(q, k, k, attn_mask=torch.ones(4, 10).bool())


def grouped(q, a, b):
    k = torch.cat([a[:, :1], b[:, :1]], 2)
    return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def in_one_piece(q, a, b):
    return F.scaled_dot_product_attention(q, a * 2, a + 1)


def in_four_pieces(q, a, b):
    return attend(q, a, b, a + 1, b + 1)


def double(q, a, b):
    return attend(q.double(), a.double(), b.double())


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (masked, "it has a mask"),
        (grouped, "shared by groups of q"),
        (in_one_piece, "its keys are one piece"),
        (in_four_pieces, "must be 1 to 3 pieces, got 4"),
        (double, "got torch.float64"),
    ],
)
def test_near_misses_stay_as_they_are(fn, message, trace, apply):
    records, _ = apply(trace(fn, heads(4, 6, 4)), TEXT)
    assert not records[-1].changed
    assert any(message in reason for reason in reasons(records)), reasons(records)


def test_what_is_faster_joined_stays_joined(trace, apply, monkeypatch):
    rates = Rates(joined=FAST, apart=SLOW, sparse=SLOW)
    monkeypatch.setattr(calibration, "cpu_rates", lambda dtype, dim, threads: rates)
    records, _ = apply(trace(attend, heads(4, 6, 4)), TEXT)
    assert not records[-1].changed
    assert reasons(records) == ["predicted 22.76 ms in pieces vs 0.00 ms joined"]


def test_sparse_sites_are_left_alone(mini, inputs, trace, apply):
    gm = trace(mini, inputs(4).decode, inputs(8).decode)
    records, _ = apply(gm, "canonicalize,find-attention,sparse-attention,attend-pieces")
    assert not records[-1].changed


def test_recorded_gradient_is_refused(apply):
    graphs = []
    torch._dynamo.reset()
    q, a, b = heads(4, 6, 4)
    torch.compile(attend, backend=lambda gm, _: graphs.append(gm) or gm.forward)(
        q.requires_grad_(), a, b
    )
    torch._dynamo.reset()
    records, _ = apply(graphs[0], TEXT)
    assert any("gradient is recorded" in reason for reason in reasons(records))


def test_passes_measure_nothing_by_themselves(trace, monkeypatch):
    def measured(*_):
        raise AssertionError("a pass has timed a kernel")

    monkeypatch.setattr(calibration, "cpu_rates", measured)
    gm = trace(attend, heads(4, 6, 4))
    records = run_pipeline(PassPipeline.parse(TEXT), gm, PassContext.of(gm.graph))
    assert reasons(records) == ["nothing is known of this machine's speed"]


def test_the_gate_is_given(trace):
    asked = []

    def gate(q_shape, dtype, device, tokens):
        asked.append((q_shape, dtype, device.type, tokens))
        return "too slow here"

    gm = trace(attend, heads(4, 6, 4))
    records = run_pipeline(PassPipeline.parse(TEXT), gm, PassContext.of(gm.graph, gate))
    assert asked == [((1, 2, 4, 8), torch.float32, "cpu", (6, 4))]
    assert reasons(records) == ["too slow here"]


def test_calls_of_one_form_get_one_answer(trace):
    """On a busy machine each measurement may say another thing, and steps must stay alike."""
    asked = []

    def gate(*call):
        asked.append(call)
        return None if len(asked) == 1 else "joining pays"

    def twice(q, a, b):
        return attend(attend(q, a, b), a, b)

    gm = trace(twice, heads(4, 6, 4))
    ctx = PassContext.of(gm.graph, gate)
    records = run_pipeline(PassPipeline.parse(TEXT), gm, ctx)
    assert [note.action for note in records[-1].notes] == ["rewritten", "rewritten"]
    assert len(asked) == 1
