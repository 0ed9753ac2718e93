"""A bias of keys, and the log-sum-exp: through the operator, dense, sparse and merged."""

import pytest
import torch
from kernel_cases import arguments, frame_rows, make_case, masked_dense

import lipass.kernels.ops  # noqa: F401  (registers the operators)
from lipass.kernels import dense, merge_partials, registry
from lipass.kernels.block_sparse import native

sparse_attention = torch.ops.lipass.sparse_attention
sparse_attention_lse = torch.ops.lipass.sparse_attention_lse


def exact(case, bias=None, rows=None):
    """Attend to all keys, or to some of them, in fp64; give output and log-sum-exp."""
    q, k, v = (x.double() for x in (case.q, torch.cat(case.keys, 2), torch.cat(case.values, 2)))
    score = (q @ k.mT) * case.options["scale"]
    if bias is not None:
        score = score + (bias if bias.dim() == 3 else bias[:, None])[:, :, None]
    if rows is not None:
        score = score.masked_fill(~rows, -torch.inf)
    return score.softmax(-1) @ v, score.logsumexp(-1)


def check(case, bias, expected, tolerance=1e-5, **changes):
    """Compare both operators with output and log-sum-exp."""
    call = arguments(case, **changes)
    out, lse = sparse_attention_lse(*call, key_bias=bias)
    alone = sparse_attention(*call, key_bias=bias)
    for found, wanted in ((out, expected[0]), (lse, expected[1]), (alone, expected[0])):
        torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)
    assert out.transpose(1, 2).is_contiguous()


BIASES = [(), (1,), (2,), (1, 3), (2, 3), (2, 1)]


@pytest.mark.parametrize("outer", BIASES)
@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_bias_of_every_shape(outer, route, machine):
    case = make_case("decode", 6, (4, 5), 7, (1, 4, 4), batch=2, heads=3, dim=16)
    bias = torch.randn(*outer, case.layout.tokens) if outer else None
    plan = case.plan()
    expected = masked_dense(case, plan, bias) if route == "sparse" else exact(case, bias)
    with registry.force(route):
        check(case, bias, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_bias_is_not_rounded_to_the_dtype_of_the_queries(dtype, route, machine):
    case = make_case("decode", 6, (4, 4), 7, (1, 4, 4), dim=64, dtype=dtype)
    bias = torch.zeros(1, case.layout.tokens)
    bias[:, 0] = 6.2383246  # 512 keys in one; 6.25 in bf16
    plan = case.plan()
    expected = masked_dense(case, plan, bias) if route == "sparse" else exact(case, bias)
    with registry.force(route):
        out, lse = sparse_attention_lse(*arguments(case), key_bias=bias)
        torch.testing.assert_close(lse.double(), expected[1], atol=2e-3, rtol=0)
        torch.testing.assert_close(out.double(), expected[0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_two_biases_between_which_the_queries_have_no_number(dtype, route, machine):
    case = make_case("decode", 6, (4, 4), 7, (1, 4, 4), dim=64, dtype=dtype, budget=0.999)
    bias = torch.zeros(1, case.layout.tokens)
    bias[:, 0], bias[:, 1] = 8192.0, 8194.0  # fp16 counts by 8 there, bf16 by 64
    expected = exact(case, bias)[0]
    with registry.force(route):
        out = sparse_attention(*arguments(case), key_bias=bias)
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=1e-2)


LOWEST = [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -2.5e38]


@pytest.mark.parametrize("hidden", [128, 200, 300], ids=["first group", "more", "all keys"])
@pytest.mark.parametrize("lowest", LOWEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_of_the_lowest_bias_count_only_where_there_are_no_others(
    dtype, lowest, hidden, machine
):
    """Masks of floats write `finfo(dtype).min` where others write -inf."""
    q, k, v = (torch.randn(1, 2, n, 64, dtype=dtype) for n in (64, 300, 300))
    bias = torch.zeros(1, 1, 300)
    bias[:, :, :hidden] = lowest
    score = (q.double() @ k.double().mT) * 0.125
    score = score + bias.double()[:, :, None] if hidden < 300 else torch.zeros_like(score)
    expected = score.softmax(-1) @ v.double()
    found = [dense.attend_biased(q, [k], [v], 0.125, bias, lse=lse)[0] for lse in (False, True)]
    call = (q, [k], [v], [1, 1, 64], [1, 1, 300], "history", [1, 1, 32], 0.999, 0.125, 0, "decode")
    for route in ("sparse", "dense"):
        with registry.force(route):
            found.append(sparse_attention(*call, None, "site", key_bias=bias))
            found.append(sparse_attention_lse(*call, None, "site", key_bias=bias)[0])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for out in found:
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_parts_in_which_all_keys_have_the_lowest_bias_merge_to_a_mean(machine):
    q, k, v = (torch.randn(1, 2, n, 64) for n in (64, 256, 256))
    bias = torch.full((1, 1, 128), torch.finfo(torch.float32).min)
    parts = [
        dense.attend_biased(q, [keys], [values], 0.125, bias, lse=True)[:2]
        for keys, values in zip(k.split(128, 2), v.split(128, 2), strict=True)
    ]
    merged, _ = merge_partials(*map(list, zip(*parts, strict=True)))
    torch.testing.assert_close(merged, v.mean(2, keepdim=True).expand_as(merged))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_the_highest_bias_hide_the_others(dtype, machine):
    q, k, v = (torch.randn(1, 2, n, 64, dtype=dtype) for n in (64, 300, 300))
    bias = torch.zeros(1, 1, 300)
    bias[:, :, 7] = torch.finfo(torch.float32).max
    for lse in (False, True):
        out, _, _ = dense.attend_biased(q, [k], [v], 0.125, bias, lse=lse)
        torch.testing.assert_close(out, v[:, :, 7:8].expand_as(out))


def test_masked_keys_of_one_head(machine):
    case = make_case("decode", 6, (4, 4), 7, (1, 4, 4), batch=1, heads=2)
    bias = torch.zeros(1, 2, case.layout.tokens)
    bias[:, 1, 3:70] = -torch.inf
    for route, expected in (("sparse", masked_dense(case, case.plan(), bias)), ("dense", None)):
        with registry.force(route):
            check(case, bias, expected or exact(case, bias))


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("route", ["sparse", "dense"])
@pytest.mark.parametrize("ragged", [False, True])
def test_bias_follows_the_frames_that_stay(role, route, ragged, machine):
    keep = torch.tensor([[True, False, True, True, False], [True, False, True, not ragged, False]])
    case = make_case(
        role, 5, (4, 4), 3, (1, 4, 4), budget=0.999, keep_frames=keep, batch=2, sink_latents=0
    )
    bias = torch.randn(2, 2, case.layout.tokens)
    with registry.force(route):
        out, lse = sparse_attention_lse(*arguments(case), key_bias=bias)
    for item in range(2):
        expected = exact(case, bias, frame_rows(case, keep[item]))
        rows = slice(None) if role == "decode" else keep[item].repeat_interleave(16)
        for found, wanted in zip((out, lse), expected, strict=True):
            torch.testing.assert_close(
                found.double()[item][:, rows], wanted[item][:, rows], atol=1e-5, rtol=1e-5
            )
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("route", ["sparse", "dense", None])
def test_parts_of_the_keys_merge_to_the_whole(route, machine):
    """Context parallel: each rank holds some latents of the history, one the rest as well."""
    case = make_case("decode", 6, (4, 4), 7, (1, 4, 4), budget=1.0)
    expected = exact(case)
    outputs, lses = [], []
    history, own = (case.keys[1].split(32, 2), case.values[1].split(32, 2)), (0, 2)
    with registry.force(route):
        for k, v in zip(*history, strict=True):
            out, lse = sparse_attention_lse(
                case.q, [k], [v], [2, 4, 4], [2, 4, 4], "history", [1, 4, 4], 1.0,
                case.options["scale"], 0, "decode", None, "rank",
            )  # fmt: skip
            outputs.append(out)
            lses.append(lse)
        k, v = ([parts[n] for n in own] for parts in (case.keys, case.values))
        out, lse = sparse_attention_lse(
            case.q, k, v, [2, 4, 4], [1, 1, 7, 2, 4, 4], "text,current", [1, 4, 4], 1.0,
            case.options["scale"], 0, "prefill", None, "rank",
        )  # fmt: skip
    merged, total = merge_partials([*outputs, out], [*lses, lse])
    torch.testing.assert_close(merged.double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total.double(), expected[1], atol=1e-5, rtol=1e-5)


def test_a_rank_without_keys_adds_nothing(machine):
    case = make_case("decode", 0, (4, 4), 0, (1, 4, 4), budget=1.0)
    out, lse = sparse_attention_lse(
        case.q, case.keys[1:2], case.values[1:2], [2, 4, 4], [0, 4, 4], "history", [1, 4, 4],
        1.0, 0.3, 0, "decode", None, "rank",
    )  # fmt: skip
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_long_rows_are_attended_some_queries_at_a_time(monkeypatch):
    from lipass.kernels import dense

    case = make_case("decode", 6, (4, 4), 7, (1, 4, 4), budget=1.0)
    monkeypatch.setattr(native, "why_not_loaded", lambda: "no compiler")
    monkeypatch.setattr(dense, "_SCORES", 1000)
    check(case, None, exact(case))


@pytest.mark.parametrize("operator", [sparse_attention, sparse_attention_lse])
def test_operators_with_a_bias_are_well_formed(operator):
    case = make_case("decode", 8, (4, 4), 3, (1, 4, 4))
    bias = {"key_bias": torch.randn(1, 2, case.layout.tokens)}
    tests = ("test_schema", "test_faketensor")
    with registry.force("sparse"):
        torch.library.opcheck(operator.default, arguments(case), bias, test_utils=tests)


def test_a_bias_that_does_not_fit_is_refused():
    case = make_case("decode", 4, (4, 4), 3, (1, 4, 4))
    with pytest.raises(ValueError, match=r"key_bias must be .* write a bias of each head as"):
        sparse_attention(*arguments(case), key_bias=torch.zeros(2, case.layout.tokens))
