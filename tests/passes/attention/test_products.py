import pytest
import torch
from torch.fx import Interpreter
from torch.nn import functional as F

from lipass.passes.attention.products import View, ignored_input, moved_axes, product

A, B, BIAS = torch.randn(3, 4, 5), torch.randn(3, 5, 6), torch.randn(3, 4, 6)


@pytest.fixture
def root(trace):
    """Return the node whose value a function returns."""

    def run(fn, *args):
        return trace(fn, args).graph.output_node().args[0][0]

    return run


@pytest.fixture
def values(root):
    """Return the node whose value a function returns, and the values of all nodes."""

    def run(fn, *args):
        node = root(fn, *args)
        interpreter = Interpreter(node.graph.owning_module, garbage_collect_values=False)
        interpreter.run(*args)
        return node, interpreter.env

    return run


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b: a @ b,
        lambda a, b: torch.bmm(a, mat2=b),
        lambda a, b: a.matmul(other=b),
        lambda a, b: torch.baddbmm(a.new_empty(()), a, batch2=b, beta=0, alpha=0.5),
        lambda a, b: torch.einsum("bmk, bkn -> nbm", a, b),
        lambda a, b: torch.einsum("bmk,bkn->bnm", [a, b]),
    ],
    ids=["operator", "bmm", "method", "baddbmm", "einsum", "einsum of a list"],
)
def test_product_has_the_value_of_its_node(values, fn):
    node, env = values(fn, A, B)
    found = product(node)
    left, right = (env[x.node].permute(x.axes) for x in (found.left, found.right))
    torch.testing.assert_close((left @ right * found.scale).permute(found.out), env[node])


def test_product_to_which_something_is_added(values):
    def fn(c, a, b):
        return torch.baddbmm(c, a, b, beta=0.5, alpha=2.0)

    node, env = values(fn, BIAS, A, B)
    found = product(node)
    left, right, added = env[found.left.node], env[found.right.node], env[found.added]
    whole = left @ right * found.scale + added * found.added_scale
    torch.testing.assert_close(whole, env[node])


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b, c: a @ b[0],
        lambda a, b, c: F.linear(a, b[0].mT),
        lambda a, b, c: a * a,
        lambda a, b, c: torch.einsum("bmk,bkn", a, b),
        lambda a, b, c: torch.einsum("...mk,...kn->...mn", a, b),
        lambda a, b, c: torch.einsum("bmk,bkn->mn", a, b),
        lambda a, b, c: torch.einsum("bmm,bkn->bmn", a[:, :, :4], b),
        lambda a, b, c: torch.einsum("bmxk,bnyk->bmn", a[:, :, None], b.mT[:, :, None]),
        lambda a, b, c: torch.einsum("bmk,bkn,bmn->bmn", a, b, c),
    ],
    ids=[
        "operands of two ranks",
        "linear",
        "elementwise",
        "einsum without an output",
        "einsum of any batch",
        "einsum over the batch",
        "einsum of a diagonal",
        "einsum over a label of one operand",
        "einsum of three",
    ],
)
def test_what_is_no_product_of_two(root, fn):
    assert product(root(fn, A, B, BIAS)) is None


@pytest.mark.parametrize(
    ("fn", "axes"),
    [
        (lambda x: x.mT, (0, 2, 1)),
        (lambda x: torch.transpose(x, dim0=-1, dim1=0), (2, 1, 0)),
        (lambda x: x.swapaxes(0, 1), (1, 0, 2)),
        (lambda x: x.permute(1, -1, 0), (1, 2, 0)),
        (lambda x: torch.permute(x, dims=(2, 0, 1)), (2, 0, 1)),
    ],
    ids=["mT", "transpose", "swapaxes", "permute", "permute by keyword"],
)
def test_axes_that_a_call_moves(root, fn, axes):
    assert moved_axes(root(lambda x: fn(x + 1), A)) == axes


@pytest.mark.parametrize("method", ["flatten", "contiguous", "squeeze", "clone", "exp"])
def test_calls_that_move_no_axes(root, method):
    assert moved_axes(root(lambda x: getattr(x + 1, method)(), A)) is None


def test_source_is_above_all_calls_that_move_axes_and_below_a_copy(values):
    node, env = values(lambda x: x.mT.contiguous().transpose(0, 1).permute(1, 2, 0), A)
    above = View(node, (1, 2, 0)).source()
    assert (above.node.target, above.shape()) == ("contiguous", [4, 5, 3])
    assert torch.equal(env[above.node].permute(above.axes), env[node].permute(1, 2, 0))


@pytest.mark.parametrize(("beta", "ignored"), [(0, True), (1, False)])
def test_input_of_baddbmm_is_ignored_with_beta_zero(root, beta, ignored):
    node = root(lambda a, b, c: torch.baddbmm(c, a, b, beta=beta), A, B, BIAS)
    assert ignored_input(node) is (node.args[0] if ignored else None)
