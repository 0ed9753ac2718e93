"""Autocast inside of the model, as Wan's own code and its descendants have it."""

import pytest
import torch
from mini import Block, Mini
from torch import nn
from torch.nn import functional as F

import lipass
from lipass.passes.graph.modes import entered, half_inside
from lipass.testing import assert_refuses, assert_rewrites

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LOW = {"device_type": "cpu", "dtype": torch.bfloat16}


class Inside(Mini):
    """Blocks run in bf16, the head in fp32: autocast is entered for each block."""

    def layer(self, *args):
        with torch.autocast(**LOW):
            return super().layer(*args)


class Around(Mini):
    """All of the model runs in one autocast."""

    def forward(self, *args):
        with torch.autocast(**LOW):
            return super().forward(*args)


def low(pairs):
    return [(k.bfloat16(), v.bfloat16()) for k, v in pairs]


def compiled(fn, preset):
    options = {"preset": preset, "inner": "aot_eager"}
    if preset == "all":
        options |= {"sparse.budget": 1.0, "context.overlap_min": 0.0}
    return torch.compile(fn, backend="light_interaction", options=options)


@pytest.mark.parametrize("preset", ["exact", "cache", "all"])
@pytest.mark.parametrize("kind", [Inside, Around])
def test_model_calls_are_as_exact_as_autocast(kind, preset, inputs):
    torch.manual_seed(0)
    model = kind().eval()
    fast = compiled(model, preset)
    for n in (8, 12):
        given = inputs(n)
        text, history = low(given.text), low(given.history)
        with torch.no_grad():
            for args in (
                (given.noise, given.level, given.w2c, text, history),
                (given.context, given.clean, given.w2c, text),
            ):
                torch.testing.assert_close(fast(*args), model(*args), atol=0.03, rtol=0.03)
    sites = lipass.report().sites.values()
    assert {site.role for site in sites} == {"prefill", "decode"}, sites


@pytest.mark.parametrize("preset", ["exact", "cache", "all"])
@pytest.mark.parametrize("kind", [Inside, Around])
def test_loop_in_the_graph_is_as_exact_as_autocast(kind, preset, inputs):
    torch.manual_seed(0)
    model, given = kind().eval(), inputs(8)
    args = given.context, given.noise, given.w2c, low(given.text), given.chunk[-1]
    with torch.no_grad():
        expected = model.chunk(*args)
        out = compiled(model.chunk, preset)(*args)
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)


def nodes_of(trace, fn, *args):
    return list(trace(fn, args).graph.nodes)


def nested(x):
    with torch.autocast(**LOW):
        y = x @ x
        with torch.autocast("cpu", enabled=False):
            z = y.float() @ x
        w = z @ z
    return w.sin()


def test_calls_know_the_autocasts_around_them(trace):
    nodes = nodes_of(trace, nested, torch.randn(4, 4))
    depth = {node.name: len(entered(node)) for node in nodes if "@" not in node.name}
    assert [depth[name] for name in ("y", "z", "w")] == [1, 2, 1]
    assert depth["output"] == 0


def test_nodes_that_an_autocast_holds_for_from_outside_are_told(trace):
    nodes = nodes_of(trace, nested, torch.randn(4, 4))
    inner = next(i for i, node in enumerate(nodes) if node.name == "z")
    assert half_inside(nodes) is None
    assert "switches autocast on around %z" in half_inside(nodes[inner : inner + 1])
    assert "enters an autocast" in half_inside(nodes[: inner + 1])


def test_attention_by_hand_stays_where_autocast_casts_it():
    def fn(q, k, v):
        with torch.autocast(**LOW):
            scores = torch.matmul(q, k.transpose(-1, -2)) * 0.25
            return torch.matmul(F.softmax(scores, -1), v)

    args = tuple(torch.randn(1, 2, 8, 16) for _ in range(3))
    assert_refuses(fn, args, "canonicalize", "not in the dtype of what they multiply")


def test_step_in_an_autocast_from_outside_is_not_outlined(inputs):
    given = inputs(8)
    args = given.context, given.noise, given.w2c, low(given.text), given.chunk[-1]
    text = "canonicalize,find-attention,find-steps,guard-steps"
    assert_refuses(Around().eval().chunk, args, text, "switches autocast on around")


def test_step_that_switches_autocast_itself_is_outlined(inputs):
    given = inputs(8)
    args = given.context, given.noise, given.w2c, low(given.text), given.chunk[-1]
    text = "canonicalize,find-attention,find-steps,guard-steps"
    assert_rewrites(Inside().eval().chunk, args, text, adds="denoise_step(")


def test_layers_that_switch_autocast_themselves_are_shared(inputs):
    """As Wan's own code does around rotary positions."""

    class Own(Block):
        def forward(self, x, text, history):
            with torch.autocast("cpu", enabled=False):
                x = (x.double() * 2).to(x.dtype)
            return super().forward(x, text, history)

    torch.manual_seed(0)
    model = Mini().eval()
    model.blocks = nn.ModuleList(Own(32, 2) for _ in range(2))
    text = "canonicalize,find-attention,share-blocks"
    assert_rewrites(model, inputs(8).decode, text, adds="blocks(", grown=inputs(12).decode)


def test_layers_in_an_autocast_from_outside_are_not_shared(inputs):
    given = inputs(8)
    args = given.noise, given.level, given.w2c, low(given.text), low(given.history)
    text = "canonicalize,find-attention,share-blocks"
    assert_refuses(Inside().eval(), args, text, "switches autocast on around")
