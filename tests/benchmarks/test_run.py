"""Which cases of the kernel benchmark a kernel takes, on devices that this machine lacks too."""

import pytest
import torch

from benchmarks import rivals, run
from lipass.kernels import BlockGrid, KvLayout, chip, plan_attention

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr(chip, "why_not", lambda device: None)
    monkeypatch.setattr(chip, "capability", lambda device: (9, 0))


def test_every_case_for_a_gpu_has_a_kernel():
    for case in run.CASES["cuda"]:
        assert run.why_no_kernel(case, torch.bfloat16, CUDA) is None


def test_cases_without_a_kernel_are_listed_with_the_reason():
    case = run.CASES["cuda"][0]
    assert "bf16 and fp16, got torch.float32" in run.why_no_kernel(case, torch.float32, CUDA)
    odd = case._replace(tile=(3, 8, 4))
    assert "got 96 queries, 96 keys" in run.why_no_kernel(odd, torch.bfloat16, CUDA)


def test_masks_of_elements_are_not_made_where_they_would_fill_a_gpu(monkeypatch):
    monkeypatch.setattr(rivals, "_MASK_BYTES", 1000)
    layout = KvLayout.build(("current",), ((2, 4, 4),), (1, 4, 4))
    q = torch.randn(1, 1, 32, 8)
    plan = plan_attention(q, [q], layout, BlockGrid((2, 4, 4), (1, 4, 4)), budget=0.5, scale=1.0,
                          role="self", sink_latents=0)  # fmt: skip
    with pytest.raises(ValueError, match="must fit 1000 bytes, got 1024"):
        rivals.rivals(q, q, q, 1.0)["mask"](plan)
