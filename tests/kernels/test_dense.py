import pytest
import torch

from lipass.kernels import dense


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "message"),
    [
        ("cuda", torch.float32, (5, 5), "CPU only, got cuda"),
        ("cpu", torch.float64, (5, 5), "fp32, bf16 and fp16, got torch.float64"),
        ("cpu", torch.float32, (5, 5, 5, 5), "1 to 3 pieces, got 4"),
        ("cpu", torch.float32, (5, 0), "one of its pieces is empty"),
    ],
)
def test_what_no_kernel_reads_in_pieces(device, dtype, tokens, message):
    assert message in dense.why_not_apart(torch.device(device), dtype, tokens)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("tokens", [(5, 300, 7, 11), (3, 0, 4, 0, 5, 6, 130)])
def test_any_number_of_pieces_has_a_bias(tokens, lse):
    q, bias = torch.randn(1, 2, 9, 16), torch.randn(1, 2, sum(tokens))
    k, v = ([torch.randn(1, 2, length, 16) for length in tokens] for _ in range(2))
    out, log_sums, _ = dense.attend_biased(q, k, v, 0.25, bias, lse=lse)
    joined = torch.cat(k, 2), torch.cat(v, 2)
    expected, sums = dense.attend_plainly(q, *joined, 0.25, bias[:, :, None])
    torch.testing.assert_close(out, expected)
    if lse:
        torch.testing.assert_close(log_sums, sums)


def test_plan_of_all_visits_every_token_once():
    plan = dense.plan_of_all(2, 3, 70, (5, 300))
    assert plan.to_dense_mask().all()
    assert int(plan.counts.max()) == plan.kv.blocks
