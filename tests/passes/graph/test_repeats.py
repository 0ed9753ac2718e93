import pytest
import torch
from torch.nn import functional as F

from lipass.passes.graph.repeats import moved, repeat_of

ROWS, TOKENS = torch.randn(2, 3, 8), torch.randn(2, 18, 8)


@torch.library.custom_op("lipass_tests::silu", mutates_args=())
def silu(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


silu.register_fake(torch.empty_like)


@pytest.fixture
def behind(trace):
    """Return what is said of the call behind a repetition of rows, and the axis it is along."""

    def run(fn):
        nodes = trace(lambda rows, x: fn(rows.repeat_interleave(6, 1), x), (ROWS, TOKENS)).graph
        (node,) = nodes.find_nodes(op="call_method", target="repeat_interleave")
        assert repeat_of(node).times == 6
        return moved(next(iter(node.users)), {node: 1})

    return run


@pytest.mark.parametrize(
    ("fn", "dim"),
    [
        (lambda r, x: r.sin(), 1),
        (lambda r, x: r * 2, 1),
        (lambda r, x: r + x.sum((0, 1)), 1),
        (lambda r, x: r[None], 2),
        (lambda r, x: r.unsqueeze(-1), 1),
        (lambda r, x: r[0], 0),
        (lambda r, x: r[..., :4], 1),
        (lambda r, x: r.unflatten(-1, (2, 4)), 1),
        (lambda r, x: F.linear(r, x[0, :5]), 1),
        (lambda r, x: r.flatten(0, 1), 0),
        (lambda r, x: r.reshape(36, 8), 0),
    ],
)
def test_calls_that_treat_rows_by_themselves(behind, fn, dim):
    assert behind(fn).dim == dim


@pytest.mark.parametrize(
    "fn",
    [
        lambda r, x: r + x,
        lambda r, x: torch.add(r, other=x),
        lambda r, x: r.sum(1),
        lambda r, x: r[:, 1:],
        lambda r, x: r[:, 0],
        lambda r, x: r.unflatten(1, (18, 1)),
        lambda r, x: r.reshape(-1, 18, 2, 4),
        lambda r, x: r.flatten(1, 2),
        lambda r, x: F.layer_norm(r, (18, 8)),
        lambda r, x: F.silu(r, True),
        lambda r, x: torch.ops.lipass_tests.silu(r),
        lambda r, x: torch.cat([r, x], -1),
        lambda r, x: r.split(6, 1)[0],
    ],
    ids=[
        "tokens", "tokens by keyword", "sum", "part of the tokens", "one token", "tokens split",
        "reshape that counts batches", "channels joined", "norm over tokens", "in place",
        "operator of that name", "tokens beside", "tokens apart",
    ],
)  # fmt: skip
def test_calls_that_need_the_repeated_rows(behind, fn):
    assert behind(fn) is None


@pytest.mark.parametrize(
    "fn",
    [
        lambda r: r.repeat(1, 6, 1),
        lambda r: r[:, None].expand(2, 6, 3, 8).flatten(1, 2),
        lambda r: r.repeat_interleave(torch.tensor([1, 2, 3]), 1, output_size=6),
        lambda r: r.repeat_interleave(6),
        lambda r: r.flatten(1, 2),
    ],
    ids=["tiled", "copies in front", "counts in a tensor", "flat", "joined"],
)
def test_what_is_no_repetition_of_rows(trace, fn):
    assert not any(repeat_of(node) for node in trace(fn, (ROWS,)).graph.nodes)
