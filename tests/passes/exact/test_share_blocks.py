# ruff: noqa: E501  (goldens: one line is one node)
import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from lipass.passes.attention.site import sites
from lipass.passes.graph.names import names_of
from lipass.passes.printer import print_graph

TEXT = "canonicalize,find-attention,share-blocks{nodes_min=2}"


class Layer(nn.Module):
    def __init__(self, act=torch.tanh, width=8):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, width), nn.Linear(width, 8), act

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    def __init__(self, *layers, head=True):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(3, 8)


def outlined(gm):
    """Count the calls of each subgraph."""
    found = {}
    for node in gm.graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.invoke_subgraph
    ):
        name = node.args[0].target
        found[name] = found.get(name, 0) + 1
    return found


def reasons(records):
    return [f"{n.site}: {n.reason}" for n in records[-1].notes if n.action == "kept"]


def test_equal_layers_call_one_subgraph(trace, apply):
    model = Net(Layer(), Layer())
    gm = trace(model, (X,))
    records, _ = apply(gm, TEXT)
    assert_expected_inline(
        records[-1].diff,
        """\
-%linear: f32[3, 8] = linear($x, $layers.0.up.weight, $layers.0.up.bias)  # layers.0.up
-%tanh: f32[3, 8] = tanh(%linear)  # layers.0
-%linear_1: f32[3, 8] = linear(%tanh, $layers.0.down.weight, $layers.0.down.bias)  # layers.0.down
-%x: f32[3, 8] = add($x, %linear_1)  # layers.0
-%linear_2: f32[3, 8] = linear(%x, $layers.1.up.weight, $layers.1.up.bias)  # layers.1.up
-%tanh_1: f32[3, 8] = tanh(%linear_2)  # layers.1
-%linear_3: f32[3, 8] = linear(%tanh_1, $layers.1.down.weight, $layers.1.down.bias)  # layers.1.down
-%x_1: f32[3, 8] = add(%x, %linear_3)  # layers.1
-%linear_4: f32[3, 2] = linear(%x_1, $head.weight, $head.bias)  # head
+%layers_call = layers($x; 4 parameters)  # layers.0
+%getitem: f32[3, 8] = getitem(%layers_call, 0)
+%layers_call_1 = layers(%getitem; 4 parameters)  # layers.1
+%getitem_1: f32[3, 8] = getitem(%layers_call_1, 0)
+%linear_4: f32[3, 2] = linear(%getitem_1, $head.weight, $head.bias)  # head
""",
    )
    assert_expected_inline(
        print_graph(gm.layers.graph),
        """\
$x: f32[3, 8] = input
%linear: f32[3, 8] = linear($x, $layers.0.up.weight, $layers.0.up.bias)  # layers.0.up
%tanh: f32[3, 8] = tanh(%linear)  # layers.0
%linear_1: f32[3, 8] = linear(%tanh, $layers.0.down.weight, $layers.0.down.bias)  # layers.0.down
%x: f32[3, 8] = add($x, %linear_1)  # layers.0
return (%x)
""",
    )


def test_output_is_the_same_to_the_bit():
    model = Net(*(Layer() for _ in range(4))).eval()
    torch._dynamo.reset()
    fast = torch.compile(
        model, backend="light_interaction", options={"pipeline": TEXT, "inner": "eager"}
    )
    with torch.no_grad():
        assert torch.equal(fast(X), model(X))
    torch._dynamo.reset()


def test_layer_that_computes_something_else_stays(trace, apply):
    gm = trace(Net(Layer(), Layer(torch.relu), Layer(), Layer(width=9)), (X,))
    apply(gm, TEXT)
    assert outlined(gm) == {"layers": 2}
    assert print_graph(gm.graph).count("linear(") == 5


def test_two_kinds_of_layers_are_two_subgraphs(trace, apply):
    gm = trace(Net(Layer(), Layer(torch.relu), Layer(), Layer(torch.relu)), (X,))
    apply(gm, TEXT)
    assert outlined(gm) == {"layers": 2, "layers_": 2}


def test_of_nested_lists_the_outer_one_is_outlined_if_its_entries_are_equal(trace, apply):
    stages = [nn.Sequential(Layer(), Layer()) for _ in range(3)]
    gm = trace(Net(*stages), (X,))
    apply(gm, TEXT)
    assert outlined(gm) == {"layers": 3}


def test_of_nested_lists_the_inner_ones_are_outlined_if_the_outer_differs(trace, apply):
    stages = [nn.Sequential(Layer(), Layer()), nn.Sequential(*(Layer() for _ in range(3)))]
    gm = trace(Net(*stages), (X,))
    apply(gm, TEXT)
    assert outlined(gm) == {"layers": 5}


def test_modules_that_all_layers_call_are_a_part_of_each(trace, apply):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.Linear(8, 8)
            self.layers = nn.ModuleList(Inner() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x, self.norm)
            return x

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x, norm):
            return torch.tanh(norm(self.lin(x)))

    gm = trace(Outer(), (X,))
    apply(gm, TEXT)
    assert outlined(gm) == {"layers": 2}


def test_caches_of_one_length_get_a_guard_that_they_stay_so(mini, inputs, trace, apply):
    gm = trace(mini, inputs(4).decode, inputs(8).decode)
    apply(gm, "canonicalize,find-attention,share-blocks")
    assert outlined(gm) == {"blocks": 2}
    ((_, site),) = sites(gm.blocks.graph)
    assert names_of(site.name) == ["blocks.0:decode", "blocks.1:decode"]


def test_sizes_that_no_input_shows_are_passed_along(mini, inputs, trace, apply):
    gm = trace(mini, inputs(4).decode, inputs(8).decode)
    text = "canonicalize,find-attention,find-poses,prune-context{window_latents=1},share-blocks"
    apply(gm, text)
    assert outlined(gm) == {"blocks": 2}
    first = gm.blocks.graph.find_nodes(op="placeholder")[0]
    assert isinstance(first.meta["example_value"], torch.SymInt)


def test_layers_of_an_outlined_step_are_outlined_in_turn(mini, inputs, trace, apply):
    gm = trace(mini.chunk, inputs(4).chunk)
    apply(gm, "canonicalize,find-attention,find-steps,guard-steps,share-blocks")
    assert outlined(gm.denoise_step) == {"blocks": 2}


class Noisy(Layer):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, training=True)


class Writing(Layer):
    def forward(self, x):
        x.mul_(2.0)
        return super().forward(x)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([Layer(), Layer(torch.relu)], "no two layers are equal; of the first two, %"),
        ([Layer(), Layer(width=9)], "differ in shape or dtype"),
        ([Noisy(), Noisy()], "draws random numbers"),
        ([Writing(), Writing()], "writes to the input"),
    ],
)
def test_near_misses_stay_as_they_are(layers, message, trace, apply):
    gm = trace(Net(*layers), (X,))
    records, _ = apply(gm, TEXT)
    assert not records[-1].changed
    assert any(message in reason for reason in reasons(records)), reasons(records)


def test_one_layer_stays_as_it_is(trace, apply):
    records, _ = apply(trace(Net(Layer()), (X,)), TEXT)
    assert not records[-1].changed


def test_small_layers_stay_as_they_are(trace, apply):
    gm = trace(Net(nn.Linear(8, 8), nn.Linear(8, 8)), (X,))
    records, _ = apply(gm, "canonicalize,share-blocks")
    assert not records[-1].changed


def test_outputs_in_one_memory_are_refused(trace, apply):
    class Two(Layer):
        def forward(self, x):
            y = super().forward(x)
            return y, y[1:]

    class Chain(Net):
        def forward(self, x):
            kept = []
            for layer in self.layers:
                x, part = layer(x)
                kept.append(part)
            return x, kept

    records, _ = apply(trace(Chain(Two(), Two()), (X,)), TEXT)
    assert not records[-1].changed
    assert any("shares memory with" in reason for reason in reasons(records))


def test_layers_that_read_a_submodule_are_refused(trace, apply):
    class Flex(Layer):
        def forward(self, x):
            q = super().forward(x)[None, None]
            return flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + i)[0, 0]

    records, _ = apply(trace(Net(Flex(), Flex()), (X,)), TEXT)
    assert not records[-1].changed
    assert any("is neither a tensor nor a size" in reason for reason in reasons(records))


def test_layers_whose_gradient_is_recorded_are_refused(apply):
    graphs = []
    torch._dynamo.reset()
    model = Net(Layer(), Layer())
    torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm.forward)(X)
    torch._dynamo.reset()
    records, _ = apply(graphs[0], TEXT)
    assert any("gradient is recorded" in reason for reason in reasons(records))
