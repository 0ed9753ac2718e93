"""Block-sparse attention: the CPU providers against dense attention, masked and whole."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import NATIVE, PROVIDERS, cases, make_case, masked_dense
from torch.nn import functional as F

from lipass.kernels.block_sparse import gather
from lipass.kernels.block_sparse.api import block_sparse_attention, merge_partials

# Output rounding plus products of inputs with as many mantissa bits: 8 (bf16) and 11 (fp16).
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def attend(case, plan, provider, **options):
    scale = case.options["scale"]
    return block_sparse_attention(
        case.q, case.keys, case.values, plan, scale=scale, provider=provider, **options
    )


def make_bias(case, kind):
    """Draw a bias that items and heads share or not; some keys are masked by it."""
    batch, heads, tokens = *case.q.shape[:2], case.layout.tokens
    shapes = {"one": (1,), "item": (batch,), "head": (1, heads), "both": (batch, heads)}
    bias = torch.randn(*shapes[kind], tokens)
    return bias.masked_fill(torch.rand(bias.shape) < 0.1, -torch.inf)


def assert_near(actual, expected, dtype=torch.float32):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("provider", PROVIDERS)
@settings(max_examples=50)
@given(case=cases(), bias=st.sampled_from([None, "one", "item", "head", "both"]))
def test_any_budget_equals_masked_dense(provider, case, bias):
    plan = case.plan()
    bias = bias and make_bias(case, bias)
    expected, expected_lse = masked_dense(case, plan, bias)
    out, lse = attend(case, plan, provider, key_bias=bias, return_lse=True)
    assert_near(out, expected)
    assert_near(lse, expected_lse)
    assert_near(attend(case, plan, provider, key_bias=bias), expected)


@pytest.mark.parametrize("provider", PROVIDERS)
@settings(max_examples=20)
@given(
    frames=st.integers(1, 20),
    size=st.sampled_from([(3, 5), (8, 8), (7, 9)]),
    text=st.sampled_from([0, 1, 127, 128, 929]),
    role=st.sampled_from(["prefill", "decode"]),
)
def test_full_budget_equals_dense(provider, frames, size, text, role):
    case = make_case(role, frames, size, text, (4, 8, 4), budget=1.0, heads=1)
    plan = case.plan()
    k, v = torch.cat(case.keys, 2), torch.cat(case.values, 2)
    expected = F.scaled_dot_product_attention(case.q, k, v)
    assert_near(attend(case, plan, provider), expected)


@pytest.mark.parametrize("provider", ["gather", NATIVE])
@pytest.mark.parametrize(
    ("size", "text"),
    [((22, 40), n) for n in (0, 1, 127, 128, 929)]
    + [((30, 52), n) for n in (0, 127, 929)]
    + [((45, 80), n) for n in (1, 929)],
)
def test_production_grids_equal_dense(provider, size, text):
    case = make_case("decode", 1, size, text, (4, 8, 4), budget=1.0, heads=1, new_frames=1)
    k, v = torch.cat(case.keys, 2), torch.cat(case.values, 2)
    expected = F.scaled_dot_product_attention(case.q, k, v)
    assert_near(attend(case, case.plan(), provider), expected)


@pytest.mark.parametrize("size", [(22, 40), (30, 52)])
def test_reference_on_production_grids_equals_dense(size):
    case = make_case("prefill", 2, size, 129, (4, 8, 4), budget=1.0, heads=1)
    k, v = torch.cat(case.keys, 2), torch.cat(case.values, 2)
    assert_near(
        attend(case, case.plan(), "reference"), F.scaled_dot_product_attention(case.q, k, v)
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_dtypes(provider, dtype, size):
    case = make_case("decode", 8, size, 33, (4, 4, 4), dim=64, dtype=dtype)
    plan = case.plan()
    out = attend(case, plan, provider)
    assert out.dtype == dtype
    assert_near(out, masked_dense(case, plan)[0], dtype)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (6, 3)])
@pytest.mark.parametrize("frames", [1, 3, 5])
def test_equal_keys_and_unit_values_give_one(provider, frames, size):
    case = make_case("prefill", frames, size, 5, (4, 4, 4), budget=0.2)
    for k, v in zip(case.keys, case.values, strict=True):
        k.fill_(0.25)
        v.fill_(1.0)
    out = attend(case, case.plan(), provider)
    # One, but for fp32 sums of several hundred weights; padding that took weight shows at 1e-2.
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-5, rtol=0)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_padding_is_never_read(provider):
    case = make_case("decode", 3, (5, 7), 5, (4, 4, 4), budget=0.5)
    plan = case.plan()
    expected = masked_dense(case, plan)[0]
    hidden = ~plan.to_dense_mask().any(2).any(1)[0]
    whole = torch.cat(case.values, 2)
    whole[:, :, hidden] = 1e6
    out = block_sparse_attention(
        case.q,
        torch.cat(case.keys, 2),
        whole,
        plan,
        scale=case.options["scale"],
        provider=provider,
    )
    assert_near(out, expected)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_without_a_key_are_zero(provider):
    case = make_case("decode", 4, (2, 2), 0, (1, 2, 2))
    plan = case.plan()
    counts = plan.counts.clone()
    counts[:, 0, 0] = 0
    plan = plan._replace(counts=counts, uniform=False)
    out, lse = attend(case, plan, provider, return_lse=True)
    empty = plan.q_grid.block_of_token() == 0
    assert (out[:, 0, empty] == 0).all()
    assert (lse[:, 0, empty] == -torch.inf).all()
    assert torch.isfinite(out).all()
    assert torch.isfinite(attend(case, plan, provider)).all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_merged_partials_equal_the_whole(provider):
    case = make_case("decode", 6, (4, 4), 7, (1, 4, 4), budget=1.0)
    plan = case.plan()
    expected, expected_lse = masked_dense(case, plan)
    outputs, lses = [], []
    for part in (plan.indices[..., :3], plan.indices[..., 3:]):
        counts = torch.full_like(plan.counts, part.shape[-1])
        some = plan._replace(indices=part, counts=counts, shared_segments=())
        out, lse = attend(case, some, provider, return_lse=True)
        outputs.append(out)
        lses.append(lse)
    merged, lse = merge_partials(outputs, lses)
    assert_near(merged, expected)
    assert_near(lse, expected_lse)


def test_merging_with_nothing_changes_nothing():
    out, lse = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2)
    nothing = torch.full_like(lse, -torch.inf)
    merged, total = merge_partials([out, torch.zeros_like(out)], [lse, nothing])
    torch.testing.assert_close((merged, total), (out, lse))
    merged, total = merge_partials([out * 0, out * 0], [nothing, nothing])
    assert (merged == 0).all()
    assert (total == -torch.inf).all()


@pytest.mark.parametrize("provider", ["gather", NATIVE])
def test_merged_key_with_log_bias_equals_its_copies(provider):
    case = make_case("decode", 4, (4, 4), 1, (1, 4, 4), budget=0.4)
    plan = case.plan()
    bias = torch.zeros(1, case.layout.tokens)
    bias[:, 0] = torch.tensor(7.0).log()
    copies = make_case("decode", 4, (4, 4), 7, (1, 4, 4), budget=0.4)
    copies.q, copies.keys[1:], copies.values[1:] = case.q, case.keys[1:], case.values[1:]
    copies.keys[0] = case.keys[0].expand(-1, -1, 7, -1)
    copies.values[0] = case.values[0].expand(-1, -1, 7, -1)
    assert_near(
        attend(case, plan, provider, key_bias=bias), attend(copies, copies.plan(), "reference")
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_segments_equal_their_concatenation(provider):
    case = make_case("decode", 8, (8, 8), 32, (1, 8, 8))
    plan = case.plan()
    whole = block_sparse_attention(
        case.q, torch.cat(case.keys, 2), torch.cat(case.values, 2), plan,
        scale=case.options["scale"], provider=provider,
    )  # fmt: skip
    assert torch.equal(whole, attend(case, plan, provider))


@pytest.mark.parametrize("provider", ["gather", NATIVE])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_strided_tensors_are_taken_as_they_are(provider, size):
    case = make_case("decode", 8, size, 32, (4, 4, 4))
    expected = attend(case, case.plan(), provider)

    def strided(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    case.q = strided(case.q)
    case.keys, case.values = (list(map(strided, parts)) for parts in (case.keys, case.values))
    out = attend(case, case.plan(), provider)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, expected)


def test_chunks_do_not_change_the_result(monkeypatch):
    case = make_case("prefill", 8, (8, 8), 32, (4, 4, 4))
    expected = attend(case, case.plan(), "gather")
    monkeypatch.setattr(gather, "_CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(gather, "_BUFFER_BYTES", 1 << 13)
    assert_near(attend(case, case.plan(), "gather"), expected)


def test_buffers_survive_inference_mode():
    case = make_case("decode", 3, (4, 4), 2, (1, 4, 4), dim=48)
    with torch.inference_mode():
        first = attend(case, case.plan(), "gather").clone()
    assert torch.equal(attend(case, case.plan(), "gather"), first)


def test_tables_made_in_inference_mode_serve_gradients():
    case = make_case("decode", 3, (4, 5), 2, (1, 4, 4), dim=12)
    with torch.inference_mode():
        case.plan()
        attend(case, case.plan(), "reference")
    case.q.requires_grad_()
    attend(case, case.plan(), "reference").sum().backward()
    assert case.q.grad.abs().sum() > 0


@pytest.mark.parametrize("provider", ["gather", "native"])
@pytest.mark.parametrize("needs", ["q", "k", "v", "bias"])
def test_what_needs_a_gradient_is_refused(provider, needs):
    case = make_case("decode", 3, (4, 4), 2, (1, 4, 4))
    plan, bias = case.plan(), torch.randn(1, case.layout.tokens)
    needed = {"q": case.q, "k": case.keys[1], "v": case.values[0], "bias": bias}[needs]
    needed.requires_grad_()
    with pytest.raises(ValueError, match="no backward"):
        attend(case, plan, provider, key_bias=bias)
    attend(case, plan, None, key_bias=bias).square().sum().backward()
    assert needed.grad.abs().sum() > 0
    with torch.no_grad():
        assert not attend(case, plan, None, key_bias=bias).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: {"q": case.q[:, :, 1:]}, "build the plan for these queries"),
        (lambda case: {"k": case.keys[1:]}, "build the plan for these keys"),
        (lambda case: {"v": [v[:, :1] for v in case.values]}, "expand grouped or shared heads"),
        (lambda case: {"k": [k.half() for k in case.keys]}, "one dtype"),
        (lambda case: {"key_bias": torch.zeros(1, 3)}, "key_bias must be"),
        (lambda case: {"key_bias": torch.zeros(2, case.layout.tokens)}, r"as \[1, H, L\]"),
        (lambda case: {"key_bias": torch.zeros(1, 1, 2, case.layout.tokens)}, "key_bias must be"),
        (lambda case: {"key_bias": torch.zeros(1, case.layout.tokens).int()}, "of floats"),
        (lambda case: {"provider": "magic"}, "magic"),
        (lambda case: {"provider": "triton"}, "triton: "),
    ],
)
def test_wrong_calls_are_refused(change, message):
    case = make_case("decode", 3, (4, 4), 2, (1, 4, 4))
    call = {"q": case.q, "k": case.keys, "v": case.values, "plan": case.plan()} | change(case)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**call)


def test_example_of_its_readme_runs_and_is_masked_attention():
    text = Path(gather.__file__).with_name("README.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    k, v = torch.cat(names["keys"], 2), torch.cat(names["values"], 2)
    mask = names["plan"].to_dense_mask()
    assert not mask.all()
    assert_near(names["out"], F.scaled_dot_product_attention(names["q"], k, v, attn_mask=mask))
