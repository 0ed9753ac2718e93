"""Where tokens are behind a call, whatever order they come in."""

import inspect
import itertools

import pytest
import torch
from torch.nn import functional as F

from lipass.kernels.tile_order import token_at_place
from lipass.passes.graph.token_order import Clip, Kept, Tokens, through
from lipass.passes.graph.token_views import Axes, reshaped
from lipass.passes.graph.try_order import differs

GRID, TILE = (2, 4, 6), (1, 2, 2)
CLIP = Clip(GRID, TILE)
WHOLE = token_at_place(GRID, TILE)
LATENT = token_at_place((1, 4, 6), TILE)


def put(x, axis, whole):
    return x.index_select(axis, WHOLE if whole else LATENT)


VIEWS = [
    # before, (axis, whole), after, what is found: axis and whole, `grid` or nothing
    ((3, 48, 8), (1, True), (3, 48, 2, 4), (1, True)),
    ((3, 48, 8), (1, True), (1, 3, 48, 8), (2, True)),
    ((3, 48, 8), (1, True), (3, 2, 24, 8), (2, False)),
    ((3, 48, 8), (1, True), (6, 24, 8), (1, False)),
    ((6, 24, 8), (1, False), (3, 48, 8), (1, True)),
    ((3, 2, 24, 8), (2, False), (3, 48, 8), (1, True)),
    ((3, 2, 24, 8), (2, False), (6, 24, 8), (1, False)),
    ((3, 2, 24, 8), (2, False), (3, 2, 24, 2, 4), (2, False)),
    ((3, 48, 8), (1, True), (3, 2, 4, 6, 8), "grid"),
    ((3, 48, 8), (1, True), (6, 4, 6, 8), "grid"),
    ((6, 24, 8), (1, False), (6, 4, 6, 8), "grid"),
    ((3, 48, 8), (1, True), (144, 8), None),
    ((3, 48, 8), (1, True), (3, 384), None),
    ((3, 48, 8), (1, True), (3, 4, 12, 8), None),
    ((3, 8, 48), (2, True), (3, 384), None),
]


@pytest.mark.parametrize(("before", "tokens", "after", "expected"), VIEWS)
def test_reshapes(before, tokens, after, expected):
    axis, whole = tokens
    found = reshaped(before, after, Axes(GRID, axis, whole), True)
    if not isinstance(expected, tuple):
        assert (found and found.whole is None) == (expected and True)
        return
    assert found[1:] == expected
    x = torch.arange(float(torch.Size(before).numel())).view(before)
    assert torch.equal(put(x, axis, whole).reshape(after), put(x.reshape(after), *expected))


def test_latents_are_not_cut_apart_where_tiles_mix_them():
    assert reshaped((3, 48, 8), (3, 2, 24, 8), Axes(GRID, 1, True), False) is None
    assert reshaped((3, 48, 8), (6, 24, 8), Axes(GRID, 1, True), False) is None


X, Y, W = torch.randn(2, 48, 8), torch.randn(2, 48, 8), torch.randn(8, 8)
QKV = torch.randn(3, 2, 2, 48, 8).unbind(0)

CALLS = {
    "sum": (lambda x, y: x + y, (X, Y)),
    "broadcast": (lambda x, y: x * y, (X, torch.randn(2, 1, 8))),
    "scalar": (lambda x: x.clamp(min=0) + 2.0, (X,)),
    "table": (lambda x, y: x * y, (X, torch.randn(48, 1))),
    "where": (lambda x, y: torch.where(y, x, 0.0), (X, torch.rand(2, 48, 1) < 0.5)),
    "linear": (lambda x, w: F.linear(x, w), (X, W)),
    "layer norm": (lambda x: F.layer_norm(x, (8,)), (X,)),
    "rms norm": (lambda x, w: F.rms_norm(x, (8,), w), (X, torch.randn(8))),
    "norm by hand": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), (X,)),
    "normalize": (lambda x: F.normalize(x, dim=-1), (X,)),
    "length of each": (lambda x: x / x.norm(dim=-1, keepdim=True), (X,)),
    "length by another name": (lambda x: torch.linalg.vector_norm(x, 2, -1), (X,)),
    "convolution over time, by places": (
        lambda x: F.conv1d(x, torch.ones(4, 2, 3), padding=1),
        (torch.randn(48, 2, 8),),
    ),
    "einsum with dots": (lambda x, w: torch.einsum("...c,cd->...d", x, w), (X, W)),
    "softmax over features": (lambda x: x.softmax(-1), (X,)),
    "softmax over tokens": (lambda x: x.softmax(1), (X,)),
    "mean of tokens": (lambda x: x.mean(1), (X,)),
    "largest token": (lambda x: x.amax(dim=(1, 2)), (X,)),
    "sum of all": (lambda x: x.sum(), (X,)),
    "cat of features": (lambda x, y: torch.cat([x, y], -1), (X, Y)),
    "stack": (lambda x, y: torch.stack([x, y], 1), (X, Y)),
    "unstack": (lambda x: x.unflatten(-1, (2, 4)).unbind(2)[1], (X,)),
    "chunk": (lambda x: x.chunk(2, -1)[0], (X,)),
    "slices of features": (lambda x: x[..., ::2], (X,)),
    "new axis": (lambda x: x[:, None, :, 1:3], (X,)),
    "moved axes": (lambda x: x.permute(2, 1, 0).unsqueeze(0), (X,)),
    "expanded": (lambda x: x[None].expand(3, -1, -1, -1), (X,)),
    "matrix on features": (lambda x, w: x @ w, (X, W)),
    "matrix on the left": (lambda x, w: w @ x.mT, (X, W)),
    "tokens summed over": (lambda x, y: x.mT @ y, (X, Y)),
    "einsum": (lambda x, w: torch.einsum("blc,cd->bdl", x, w), (X, W)),
    "attention of tokens": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), QKV),
    "attention to words": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        (QKV[0], torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)),
    ),
    "cast": (lambda x: x.to(torch.float64).contiguous(), (X,)),
}


def whole_axis(x):
    """Return the axis of the tokens in an input of a call."""
    return next((n for n, size in enumerate(x.shape) if size == 48), None)


def follow(gm, moved):
    """Follow the tokens of the first input through a graph; what else has them enters."""
    at, entered = {moved: Tokens(CLIP, whole_axis(moved.meta["example_value"]), True)}, {}
    for node in gm.graph.nodes:
        if node.op == "output" or not any(one in at for one in node.all_input_nodes):
            continue
        found = through(node, at)
        assert isinstance(found, Kept), found
        assert differs(node, at, found) is None
        entered |= found.enter
        if found.tokens is not None:
            at[node] = found.tokens
    (out,) = gm.graph.output_node().args[0]
    return at.get(out), entered


@pytest.mark.parametrize("case", CALLS)
def test_calls_treat_tokens_alike(trace, case):
    fn, args = CALLS[case]
    gm = trace(fn, args)
    inputs = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    inputs = [inputs[f"l_{name}_"] for name in inspect.signature(fn).parameters]
    out, entered = follow(gm, inputs[0])
    order = {inputs[0]: whole_axis(args[0])} | {one: at.axis for one, at in entered.items()}
    assert set(order) <= set(inputs)
    placed = [
        x.index_select(order[one], WHOLE) if one in order else x
        for one, x in zip(inputs, args, strict=True)
    ]
    expected = fn(*args)
    expected = expected if out is None else expected.index_select(out.axis, WHOLE)
    torch.testing.assert_close(fn(*placed), expected, atol=1e-5, rtol=1e-5)


def test_what_is_one_for_all_tokens_stays_where_it_is(trace):
    gm = trace(lambda x, y: x * y.expand(-1, 48, -1), (X, torch.randn(2, 1, 8)))
    moved = next(node for node in gm.graph.nodes if node.name == "l_x_")
    out, entered = follow(gm, moved)
    assert out == Tokens(CLIP, 1, True)
    assert entered == {}


LIES = {
    "running sum": lambda x: x.cumsum(1),
    "shift": lambda x: x.roll(1, 1),
    "convolution": lambda x: F.conv1d(x.mT, torch.ones(8, 8, 3), padding=1).mT,
}


@pytest.mark.parametrize("case", LIES)
def test_a_rule_that_were_wrong_would_be_seen(trace, case):
    gm = trace(LIES[case], (torch.randn(1, 48, 8),))
    at = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            at[node] = Tokens(CLIP, 1, True)
        elif node.op != "output" and any(one in at for one in node.all_input_nodes):
            known = through(node, at)
            said = Kept(at[node.all_input_nodes[0]], {})
            if isinstance(known, str):
                assert differs(node, at, said) is not None
                return
            at[node] = known.tokens
    raise AssertionError("every call was taken for one that treats tokens alike")


def test_sizes_of_two_grids_do_not_meet(trace):
    gm = trace(lambda x, y: x + y, (X, Y))
    first, second = gm.graph.find_nodes(op="placeholder")
    other = Clip(GRID, (2, 2, 2))
    at = {first: Tokens(CLIP, 1, True), second: Tokens(other, 1, True)}
    (call,) = [node for node in gm.graph.nodes if node.op.startswith("call")]
    assert "tokens of another grid" in through(call, at)


@pytest.mark.parametrize(("a", "b"), list(itertools.product((True, False), repeat=2)))
def test_sizes_of_axes(a, b):
    assert Tokens(CLIP, 0, a).size == (48 if a else 24)
    assert (Tokens(CLIP, 0, a).order == Tokens(CLIP, 1, b).order) == (a == b)
