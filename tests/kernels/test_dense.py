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


def test_plan_of_all_visits_every_token_once():
    plan = dense.plan_of_all(2, 3, 70, (5, 300))
    assert plan.to_dense_mask().all()
    assert int(plan.counts.max()) == plan.kv.blocks
