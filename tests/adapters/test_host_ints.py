"""Sizes stay ints where released code makes tensors of them and reads them back."""

import math
import sys
import types

import pytest
import torch
from torch import nn

import lipass
from lipass.adapters.cache_ends import CacheEnds
from lipass.adapters.host_ints import HostInts
from lipass.adapters.host_torch import with_host_ints, with_products
from lipass.adapters.plain_attention import attend

_WAN_LIKE = """
import math
import torch
from torch import nn

def rope(x, grid_sizes, freqs):
    out = []
    for i, (f, h, w) in enumerate(grid_sizes.tolist()):
        n = f * h * w
        out.append(torch.cat([x[i, :n] * freqs[:f].repeat_interleave(h * w)[:, None], x[i, n:]]))
    return torch.stack(out)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv3d(4, 8, (1, 2, 2), (1, 2, 2))
        self.register_buffer("freqs", torch.rand(64))

    def forward(self, x, seq_len):
        x = [self.patch(u[None]) for u in x]
        grid_sizes = torch.stack([torch.tensor(u.shape[2:], dtype=torch.long) for u in x])
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = torch.tensor([u.size(1) for u in x], dtype=torch.long)
        assert seq_lens.max() <= seq_len
        frame = math.prod(grid_sizes[0][1:]).item()
        return rope(torch.cat(x), grid_sizes, self.freqs).unflatten(1, (-1, frame)).sum(2)
"""


@pytest.fixture
def stranger():
    module = types.ModuleType("stranger_sizes")
    sys.modules["stranger_sizes"] = module
    exec(compile(_WAN_LIKE, "stranger_sizes.py", "exec"), vars(module))
    yield module
    del sys.modules["stranger_sizes"]


def test_a_grid_that_layers_read_back_is_in_one_graph(stranger, fresh_dynamo):
    model, x = stranger.Model(), torch.randn(2, 4, 3, 8, 6)
    expected = model(x, 64)
    adoption = lipass.adopt(model)
    assert [(one.where, one.name) for one in adoption.changes] == [
        ("stranger_sizes.py:8", "math"),
        ("stranger_sizes.py:8", "torch"),
    ]
    fast = torch.compile(
        model, backend="light_interaction", options={"inner": "eager"}, fullgraph=True
    )
    with torch.no_grad():
        assert torch.equal(fast(x, 64), expected)
        assert torch.equal(fast(x, 96), expected)  # a length that varies is compared too
    adoption.undo()
    assert stranger.torch is torch
    assert stranger.math is math


def _read_back(torch, math):
    sizes = torch.stack([torch.tensor(x.shape[1:]) for x in _PAIR])
    yield sizes.tolist()
    yield sizes[0, 1:].tolist()
    yield sizes[:, 0].tolist()
    yield (sizes.prod(-1) * 2 - 1).tolist()
    yield (1 - sizes // 2 % 3).tolist()
    yield math.prod(sizes[0][1:]).item()
    yield (int(sizes.max()), int(sizes.min()), int(sizes[1, 2]), len(sizes))
    yield sizes.shape == (2, 3)
    yield bool(sizes[0, 0] <= 2)
    yield bool((sizes >= 2).all()), bool((sizes == 9).any())
    longer = sizes.clone()
    longer[:, 0] = 7
    longer[0] += 1
    yield longer.tolist()
    yield torch.cat([sizes[0], sizes[1]]).tolist()
    yield [int(n) for n in sizes.to("cpu")[0].long()]
    yield torch.arange(6)[sizes[0, 0]].tolist()
    yield torch.nn.functional.one_hot(sizes, 9).sum().item()


_PAIR = [torch.zeros(1, 2, 3, 4), torch.zeros(1, 5, 6, 7)]


def test_host_ints_answer_as_tensors_do():
    assert list(_read_back(with_host_ints(torch), with_products(math))) == list(
        _read_back(torch, math)
    )


@pytest.mark.parametrize(
    "given",
    [([1.0, 2.0],), ([True, 2.5],), ([],), ([[1, 2], [3, 4]],), (3,)],
)
def test_what_is_no_size_becomes_a_tensor(given):
    assert torch.equal(with_host_ints(torch).tensor(*given), torch.tensor(*given))


def test_ints_for_a_device_are_indices_and_stay_a_tensor():
    assert isinstance(with_host_ints(torch).tensor([0, 1], device="cpu"), torch.Tensor)
    assert isinstance(with_host_ints(torch).tensor([0, 1]), torch.Tensor)
    assert isinstance(with_host_ints(torch).tensor([0, 1], dtype=torch.long), HostInts)


def test_the_end_of_a_cache_is_an_int_until_undone():
    adoption = lipass.adopt(nn.Linear(1, 1))
    index = torch.tensor([5])
    layer = {"k": torch.zeros(1, 8), "end": index, "is_init": False}
    CacheEnds(adoption).keep([layer])
    assert layer["end"].item() == 5
    layer["end"].fill_(torch.tensor(6).item()).fill_(layer["end"].item() + 1)
    assert int(layer["end"]) == 7
    adoption.undo()
    assert layer["end"] is index
    assert index.tolist() == [7]


def test_the_end_of_a_cache_that_was_made_anew_is_left_alone():
    adoption, new = lipass.adopt(nn.Linear(1, 1)), torch.tensor([0])
    layer = {"end": torch.tensor([5])}
    CacheEnds(adoption).keep([layer])
    layer["end"] = new
    adoption.undo()
    assert layer["end"] is new


def test_a_column_is_computed_and_written_element_by_element():
    grid = HostInts([[7, 2, 3], [9, 2, 3]])
    copy = grid.clone()
    copy[:, 0] = copy[:, 0] - 5
    assert copy.tolist() == [[2, 2, 3], [4, 2, 3]]
    copy[:, 1] = 1
    assert (copy[0].tolist(), grid[0].tolist()) == ([2, 1, 3], [7, 2, 3])


def test_what_is_computed_of_single_ints_can_slice(fresh_dynamo):
    """Dynamo slices with no object, and compares none with a size that varies."""

    def fn(x, memory):
        grid = HostInts([list(x.shape)])
        places = grid[0][1] * grid[0][2]
        assert memory.shape[0] * places <= x.numel()
        rest = x.flatten()[memory.shape[0] * places :]
        q, k = rest[None, :, None, None], x.flatten()[None, :, None, None]
        return attend(q, k, k, k_lens=HostInts([rest.shape[0]]))

    graphs = []

    def keep(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(fn, fullgraph=True, backend=keep)
    for frames in (4, 5, 6):
        x, memory = torch.randn(frames, 2, 3), torch.randn(2, 1)
        torch.testing.assert_close(compiled(x, memory), fn(x, memory))
    assert len(graphs) == 2
