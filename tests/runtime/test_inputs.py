import pytest
import torch

from lipass.runtime.inputs import Held, on_host


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64])
def test_tensors_on_the_host_are_compared_by_value(dtype):
    tensor = torch.ones(3, dtype=dtype)
    held = Held(tensor)
    assert held.is_same(tensor)
    assert held.is_same(torch.ones(3, dtype=dtype))
    assert not held.is_same(torch.zeros(3, dtype=dtype))
    tensor.mul_(0)
    assert not held.is_same(tensor)


def test_tensors_on_a_device_are_never_read():
    """Its memory cannot be read, as that of a GPU not without waiting."""
    tensor = torch.ones(3, device="meta")
    assert on_host(tensor) is None
    assert Held(tensor).is_same(tensor)
    assert not Held(tensor).is_same(torch.ones(3, device="meta"))


def test_view_of_the_same_memory_is_the_same():
    tensor = torch.randn(4, 4)
    assert Held(tensor[:2]).is_same(tensor[:2])
    assert not Held(tensor[:2]).is_same(tensor[2:])
    assert Held(torch.randn(1 << 21)[:4]).is_same(3) is False
