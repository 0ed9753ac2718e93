"""What is handed over comes out as it went in, and nothing else goes in."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from lipass.stages.packet import Packet, pack, room_for, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64,
          torch.bool, torch.complex64, torch.float8_e4m3fn]  # fmt: skip


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_and_shape(dtype):
    shapes = [(3, 5), (), (0, 4), (1, 2, 3, 4, 5), (7,)]
    item = [torch.randn(shape).mul(3).to(dtype) for shape in shapes]
    found = unpack(pack(item))
    for given, came in zip(item, found, strict=True):
        assert came.dtype == dtype
        assert came.shape == given.shape
        assert torch.equal(bits(came), bits(given))


def test_structure_and_plain_values():
    item = {"a": [1, (2.5, None), "text", True], 3: {}, None: (), "nested": {"x": [[]]}}
    found = unpack(pack(item))
    assert found == item
    assert type(found["a"][1]) is tuple
    assert type(found["a"][3]) is bool


def test_numbers_come_to_the_bit():
    item = [0.1, 1e308, -0.0, float("inf"), 2**80]
    assert unpack(pack(item)) == item
    assert str(unpack(pack(-0.0))) == "-0.0"


def test_what_is_handed_over_is_a_copy():
    given = torch.zeros(3)
    packet = pack(given)
    given += 1
    assert torch.equal(unpack(packet), torch.zeros(3))


def test_views_and_gradients_stay_behind():
    x = torch.arange(12.0, requires_grad=True).view(3, 4).T
    found = unpack(pack(x))
    assert torch.equal(found, x)
    assert found.is_contiguous()
    assert not found.requires_grad


def test_text_says_how_much_room_the_bytes_need():
    packet = pack([torch.ones(3, 3), torch.ones(2, dtype=torch.bool)])
    assert room_for(packet.text).shape == packet.data.shape
    assert torch.equal(unpack(Packet(packet.text, packet.data.clone()))[0], torch.ones(3, 3))


class Pair(NamedTuple):
    x: int


@pytest.mark.parametrize(
    "item",
    [object(), np.zeros(3), np.float32(1), b"bytes", {1, 2}, Pair(1), [{"x": slice(1)}]],
    ids=lambda item: type(item).__name__,
)
def test_what_is_not_plain_is_refused(item):
    with pytest.raises(TypeError, match=r"must be tensors, numbers.*got .*take it apart"):
        pack(item)


def test_keys_that_are_not_plain_are_refused():
    with pytest.raises(TypeError, match=r"keys of what is handed over must be text"):
        pack({(1, 2): 3})


def test_layouts_without_plain_bytes_are_refused():
    with pytest.raises(TypeError, match="must be tensors"):
        pack(torch.eye(3).to_sparse())
