"""Rows of a history are told by what they hold."""

import pytest
import torch

from lipass.kernels.merge.rows import row_marks


def drawn(length=20, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, length, 8, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_keep_their_number_wherever_they_lie(dtype):
    k, v = drawn(dtype=dtype), drawn(dtype=dtype, seed=1)
    marks = row_marks(k, v)
    assert marks.unique().numel() == 20
    order = torch.randperm(20)
    assert torch.equal(row_marks(k[:, :, order], v[:, :, order]), marks[order])
    assert torch.equal(row_marks(k[:, :, 5:], v[:, :, 5:]), marks[5:])
    views = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    assert torch.equal(row_marks(*views), marks)


@pytest.mark.parametrize("place", ["key", "value", "batch", "head"])
def test_one_number_that_differs_tells(place):
    k, v = drawn(), drawn(seed=1)
    marks = row_marks(k, v)
    if place == "key":
        k[0, 0, 3, 2] += 1e-6
    elif place == "value":
        v[1, 2, 3, 7] += 1e-6
    elif place == "batch":
        k[:, :, 3] = k[:, :, 3].flip(0)
    else:
        k[:, :, 3] = k[:, :, 3].flip(1)
    assert (row_marks(k, v) != marks).nonzero().tolist() == [[3]]


def test_equal_rows_are_counted():
    k, v = drawn(4), drawn(4, seed=1)
    twice = row_marks(k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1))
    assert twice.unique().numel() == 12
    assert torch.equal(twice[:4], row_marks(k, v))
