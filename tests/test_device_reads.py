"""`lipass.testing.device_reads()`: each kind of read is seen, and what reads nothing is not."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lipass.testing import assert_no_device_reads, device_reads

X = torch.arange(1.0, 13.0).view(3, 4)
ROWS = torch.tensor([0, 2])

READS = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x[0, 0]),
    "int": lambda x: int(x[0, 0]),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if (x > 0).any() else 0,
    "is_nonzero": lambda x: torch.is_nonzero(x[0, 0]),
    "index of a list": lambda x: [1, 2, 3][ROWS[0]],
    "slice": lambda x: x[ROWS[0] :],
    "range": lambda x: list(range(ROWS[1])),
    "format": lambda x: f"{x[0, 0]:.1f}",
    "max of Python": lambda x: max(x[0]),
    "in": lambda x: 3.0 in x,
    "full": lambda x: torch.full((2,), x[0, 0]),
    "arange": lambda x: torch.arange(ROWS[1]),
    "one_hot": lambda x: F.one_hot(ROWS),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 2),
    "mask": lambda x: x[x > 2],
    "mask is filled with rows": lambda x: x.clone().index_put_(
        (x[:, 0] > 2,), x[:1, :].expand(2, 4)
    ),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "unique rows": lambda x: x.unique(dim=0),
    "bincount": lambda x: ROWS.bincount(),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x + 1),
    "repeat_interleave by a tensor": lambda x: x[:2].repeat_interleave(ROWS, 0),
    "linalg.inv": lambda x: torch.linalg.inv(torch.eye(3)),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "to a device": lambda x: x.to(device=torch.device("cpu"), dtype=torch.float16),
    "print": lambda x: str(x),
}

READS_NOTHING = {
    "arithmetic": lambda x: (x * x[0, 0]).clamp(min=x[0, 1]) + 1,
    "shape": lambda x: x.new_zeros(x.shape[0], len(x), x.numel()),
    "choice": lambda x: torch.where(x > 2, x, 0),
    "rows": lambda x: x[ROWS],
    "index_select": lambda x: x.index_select(0, ROWS),
    "index of a tensor on the device": lambda x: x.gather(0, ROWS[None].expand(1, 2)),
    "masked_fill": lambda x: x.masked_fill(x > 2, 0.0),
    "mask is filled": lambda x: x.clone().__setitem__(x > 2, 0.0),
    "topk": lambda x: x.topk(2),
    "sort": lambda x: x.sort(),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "repeat_interleave of a known size": lambda x: x[:2].repeat_interleave(ROWS, 0, output_size=2),
    "dtype": lambda x: x.to(torch.float16).to(x),
    "copy": lambda x: torch.empty_like(x).copy_(x),
    "inverse without a check": lambda x: torch.linalg.inv_ex(torch.eye(3)),
    "nonzero of a known size": lambda x: torch.nonzero_static(x, size=4),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
}


@pytest.mark.parametrize("name", READS)
def test_read_is_seen(name):
    with device_reads(host=True) as reads:
        READS[name](X)
    assert reads
    assert all(read.where.startswith(__file__) for read in reads)


@pytest.mark.parametrize("name", READS_NOTHING)
def test_what_reads_nothing_is_not_seen(name):
    with assert_no_device_reads(host=True):
        READS_NOTHING[name](X)


def test_each_read_counts_once():
    with device_reads(host=True) as reads:
        X.tolist()
        X.cpu()
        np.asarray(X)
        X[0, 0].item()
        str(X)
    names = [read.operator for read in reads]
    assert names == [
        "Tensor.tolist",
        "Tensor.cpu",
        "Tensor.__array__",
        "aten._local_scalar_dense",
        "Tensor.__repr__",
    ]


def test_assertion_names_the_places_and_the_remedy():
    with pytest.raises(AssertionError) as raised, assert_no_device_reads(host=True):
        [row[0].item() for row in X]
    said = str(raised.value)
    assert "got 3 reads:\n  3x aten._local_scalar_dense at " in said
    assert f"{__file__}:" in said
    assert "read it once outside of the loop" in said


def test_files_may_be_allowed():
    with assert_no_device_reads(host=True, allow=("test_device_reads.py",)):
        X[0, 0].item()


def test_error_in_the_block_is_the_one_that_is_raised():
    with pytest.raises(ZeroDivisionError), assert_no_device_reads(host=True):
        X[0, 0].item() / 0


def test_tensors_on_the_host_count_only_where_asked_for():
    with assert_no_device_reads(host=False):
        for read in READS.values():
            read(X)


def test_methods_are_themselves_again():
    before = {name: getattr(torch.Tensor, name) for name in ("cpu", "to", "tolist", "__repr__")}
    own = dict(vars(torch.Tensor))
    with device_reads():
        pass
    assert {name: getattr(torch.Tensor, name) for name in before} == before
    assert dict(vars(torch.Tensor)) == own


def compiled(fn, inner="eager"):
    torch._dynamo.reset()
    options = {"preset": "exact", "inner": inner}
    return torch.compile(fn, backend="light_interaction", options=options)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", ["nonzero", "mask", "item", "tolist", "cpu", "bool"])
def test_reads_of_compiled_functions_are_seen(name, warm):
    fn = compiled(READS[name])
    if warm:
        fn(X)
    with device_reads(host=True) as reads:
        fn(X)
    assert reads


@pytest.mark.parametrize("name", ["arithmetic", "rows", "choice", "attention", "dtype"])
def test_compiling_reads_nothing(name):
    fn = compiled(READS_NOTHING[name])
    with assert_no_device_reads(host=True):
        fn(X)
        fn(X)


def test_graphs_are_compiled_as_without_the_detector():
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    fn = torch.compile(lambda x: x.to("cpu").sin() + x.cpu(), backend=backend)
    with device_reads(host=True) as reads:
        fn(X)
    fn(X)
    assert len(graphs) == 1
    assert len(reads) == 2
