import math

import pytest
import torch
from torch.nn import functional as F

from lipass.kernels import registry
from lipass.kernels.distinct import attend_distinct, distinct_keys


def padded(tokens, length, *, batch=1, heads=2, dim=16, dtype=torch.float32, seed=0):
    """Draw keys or values of a prompt, all behind the first `tokens` equal within each head."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, tokens + 1, dim, generator=generator, dtype=dtype)
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, length - tokens - 1, -1)], 2)


def queries(length=32, *, batch=1, heads=2, dim=16, dtype=torch.float32):
    return torch.randn(batch, heads, length, dim, dtype=dtype)


@pytest.mark.parametrize("tokens", [0, 1, 37, 60])
def test_run_of_equal_keys_is_counted(tokens):
    k, v = padded(tokens, 64), padded(tokens, 64, seed=1)
    assert int(distinct_keys(k, v)) == tokens + 1


def test_all_keys_are_distinct():
    assert int(distinct_keys(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4))) == 9


def test_equal_keys_in_front_do_not_count():
    k, v = padded(4, 64).flip(2), padded(4, 64, seed=1).flip(2)
    assert int(distinct_keys(k, v)) == 64


@pytest.mark.parametrize("other", ["value", "head", "item"])
def test_one_difference_ends_the_run(other):
    k, v = padded(4, 64, batch=2), padded(4, 64, batch=2, seed=1)
    if other == "value":
        v[0, 0, 50, 3] += 1
    elif other == "head":
        k[0, 1, 50, 3] += 1
    else:
        k[1, 0, 50, 3] += 1
    assert int(distinct_keys(k, v)) == 52


def test_keys_that_are_no_numbers_are_not_merged():
    k, v = padded(4, 64), padded(4, 64, seed=1)
    k[:, :, 10:] = math.nan
    assert int(distinct_keys(k, v)) == 64


@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize("tokens", [0, 1, 37, 400])
def test_merged_equals_all_keys(tokens, dim):
    k, v = padded(tokens, 512, dim=dim), padded(tokens, 512, dim=dim, seed=1)
    q = queries(dim=dim)
    out, ran = attend_distinct(q, k, v, tokens + 1, 0.3)
    assert ran == "merged"
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
    torch.testing.assert_close(out.double(), dense, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_is_as_exact_as_dense_in_16_bits(dtype):
    k, v = (padded(37, 512, dtype=dtype, seed=seed) for seed in (0, 1))
    q = queries(dtype=dtype)
    out, _ = attend_distinct(q, k, v, 38, 0.3)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
    dense = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    own = (out.double() - exact).abs().max()
    assert own <= 1.5 * (dense.double() - exact).abs().max() + 1e-4


def test_leaving_padding_out_would_be_wrong():
    k, v, q = padded(37, 512), padded(37, 512, seed=1), queries()
    out, _ = attend_distinct(q, k, v, 38, 0.3)
    for keys in (37, 38):
        dropped = F.scaled_dot_product_attention(q, k[:, :, :keys], v[:, :, :keys], scale=0.3)
        assert (out - dropped).abs().max() > 0.1


def test_few_equal_keys_stay():
    k, v, q = padded(50, 64), padded(50, 64, seed=1), queries()
    out, ran = attend_distinct(q, k, v, 51, 0.3)
    assert ran == "sdpa"
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, scale=0.3))


def test_operator_is_counted_by_keys():
    registry.reset_telemetry()
    k, v, q = padded(37, 512), padded(37, 512, seed=1), queries()
    distinct = torch.ops.lipass.distinct_keys(k, v)
    torch.ops.lipass.attend_distinct(q, k, v, distinct, 0.3, "cross")
    counts = registry.telemetry()["cross"]
    assert (counts.provider, counts.role) == ("merged", "cross")
    assert counts.density == pytest.approx(38 / 512)


def test_operators_pass_opcheck():
    k, v, q = padded(37, 512), padded(37, 512, seed=1), queries()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lipass.distinct_keys.default, (k, v), test_utils=tests)
    torch.library.opcheck(
        torch.ops.lipass.attend_distinct.default,
        (q, k, v, torch.tensor(38), 0.3, "cross"),
        test_utils=tests,
    )


def test_other_devices_attend_to_every_key():
    q, k, v = (x.to("meta") for x in (queries(), padded(4, 64), padded(4, 64, seed=1)))
    out, provider = attend_distinct(q, k, v, 5, 0.25)
    assert (out.shape, provider) == (q.shape, "sdpa")
