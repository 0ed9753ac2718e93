"""One operator in many forms: what passes ask is answered alike for all of them."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lipass.passes.graph import ops
from lipass.passes.graph.writes import memory_written, mutates, storage
from lipass.testing import run_passes

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X, Y = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
aten = torch.ops.aten


@pytest.fixture(params=[torch.no_grad, torch.inference_mode])
def call(request, trace):
    """Return the last call in the graph of a function of X and Y."""

    def run(fn, *args):
        with request.param():
            gm = trace(fn, args or (X.clone(), Y.clone()))
        return [node for node in gm.graph.nodes if node.op.startswith("call")][-1]

    return run


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y: x.flatten(1, 2),
        lambda x, y: torch.flatten(x, 1, 2),
        lambda x, y: torch.flatten(input=x, start_dim=1, end_dim=2),
        lambda x, y: x.reshape(2, 12, 8),
        lambda x, y: torch.reshape(x, (2, 12, 8)),
        lambda x, y: x.view(2, -1, 8),
        lambda x, y: aten.reshape.default(x, [2, 12, 8]),
        lambda x, y: x.unflatten(-1, (2, 4)),
        lambda x, y: torch.unflatten(x, -1, (2, 4)),
        lambda x, y: torch.unsqueeze(x, 1),
        lambda x, y: x.reshape_as(y.flatten(1, 2)),
    ],
)
def test_forms_of_a_reshape(call, fn):
    node = call(fn)
    assert all(ask(node) for ask in (ops.is_reshape, ops.is_view, ops.is_other_look))
    assert not ops.is_cast(node)
    assert ops.moved_axes(node) is None


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y: x.transpose(1, 2),
        lambda x, y: torch.transpose(x, 1, 2),
        lambda x, y: torch.transpose(input=x, dim0=-3, dim1=2),
        lambda x, y: x.permute(0, 2, 1, 3),
        lambda x, y: x.permute((0, 2, 1, 3)),
        lambda x, y: torch.permute(x, (0, 2, 1, 3)),
        lambda x, y: torch.swapaxes(x, 1, 2),
        lambda x, y: x.swapdims(2, 1),
        lambda x, y: torch.movedim(x, 1, 2),
        lambda x, y: aten.transpose.int(x, 1, 2),
        lambda x, y: aten.permute(x, [0, 2, 1, 3]),
    ],
)
def test_forms_of_a_transposition(call, fn):
    node = call(fn)
    assert ops.moved_axes(node) == (0, 2, 1, 3)
    assert not ops.is_reshape(node)


@pytest.mark.parametrize("fn", [lambda x, y: x.mT, lambda x, y: x.mH, lambda x, y: x.adjoint()])
def test_attributes_that_move_axes(call, fn):
    assert ops.moved_axes(call(fn)) == (0, 1, 3, 2)


def test_reversed_axes(call):
    assert ops.moved_axes(call(lambda x, y: x[0, 0].T)) == (1, 0)


@pytest.mark.parametrize(
    ("fn", "copy"),
    [
        (lambda x, y: x.contiguous(), True),
        (lambda x, y: x.transpose(1, 2).contiguous(), True),
        (lambda x, y: torch.clone(x), True),
        (lambda x, y: x.detach(), True),
        (lambda x, y: x.to(torch.float32), True),
        (lambda x, y: F.dropout(x, 0.5, False), True),
        (lambda x, y: F.alpha_dropout(x, 0.5, training=False), True),
        (lambda x, y: x.half(), False),
        (lambda x, y: x.to(torch.bfloat16), False),
        (lambda x, y: x.type(torch.double), False),
        (lambda x, y: x.type_as(y.double()), False),
        (lambda x, y: x.to(dtype=torch.float16), False),
    ],
)
def test_forms_of_a_copy_and_a_cast(call, fn, copy):
    node = call(fn)
    assert ops.is_cast(node)
    assert ops.is_copy(node) is copy


@pytest.mark.parametrize("fn", [lambda x, y: x.conj(), lambda x, y: x.real, lambda x, y: x[:1]])
def test_what_is_no_copy(call, fn):
    assert not ops.is_cast(call(fn, torch.randn(2, 2, dtype=torch.complex64), Y))


def test_move_to_another_device_is_no_cast(call):
    assert not ops.is_cast(call(lambda x, y: x.to("meta")))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y: x + y,
        lambda x, y: torch.add(x, y, alpha=2),
        lambda x, y: 2 / x,
        lambda x, y: torch.true_divide(x, y),
        lambda x, y: F.silu(x),
        lambda x, y: F.hardswish(x),
        lambda x, y: F.softplus(x),
        lambda x, y: F.logsigmoid(x),
        lambda x, y: torch.lerp(x, y, 0.5),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: x.clamp(min=0),
        lambda x, y: x.bfloat16(),
        lambda x, y: aten.mul.Tensor(x, y),
    ],
)
def test_forms_of_pointwise_calls(call, fn):
    assert ops.is_pointwise(call(fn))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y: x.cumsum(1),
        lambda x, y: F.glu(x),
        lambda x, y: x.softmax(-1),
        lambda x, y: x.mul_(2),
        lambda x, y: F.relu(x, inplace=True),
        lambda x, y: F.dropout(x, 0.5, True),
        lambda x, y: torch.rand_like(x),
        lambda x, y: x @ y.mT,
    ],
)
def test_what_is_not_pointwise(call, fn):
    assert not ops.is_pointwise(call(fn))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y: x @ y.mT,
        lambda x, y: torch.matmul(x, y.mT),
        lambda x, y: x.matmul(y.mT),
        lambda x, y: x.__matmul__(y.mT),
        lambda x, y: aten.matmul.default(x, y.mT),
        lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y),
        lambda x, y: torch.bmm(x[0], y[0].mT),
        lambda x, y: F.linear(x, y[0, 0]),
    ],
)
def test_forms_of_a_product(call, fn):
    node = call(fn)
    assert ops.is_product(node)
    rows, columns = node.meta["example_value"].shape[-2:]
    batch = node.meta["example_value"].numel() // (rows * columns)
    assert ops.flops(node) == 2 * batch * rows * columns * 8


DRAWS = {
    "gumbel": lambda x: F.gumbel_softmax(x, 1.0),
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.5, True, True),
    "dropout of aten": lambda x: torch.dropout(x, 0.5, True),
    "dropout1d": lambda x: F.dropout1d(x, 0.5),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli method": lambda x: x.sigmoid().bernoulli(),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "uniform_": lambda x: x.new_empty(x.shape).uniform_(),
    "rand": lambda x: torch.rand(2, 4),
    "randn": lambda x: torch.randn(x.shape),
    "randn_like": lambda x: torch.randn_like(x),
    "randint_like": lambda x: torch.randint_like(x, 5),
    "normal": lambda x: torch.normal(x, 1.0),
    "poisson": lambda x: torch.poisson(x.exp()),
    "multinomial": lambda x: torch.multinomial(x.softmax(-1), 4) * 1.0,
    "randperm": lambda x: torch.randperm(4) * 1.0,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "of aten": lambda x: aten.rand_like.default(x),
    "distribution": lambda x: torch.distributions.Normal(x, 1.0, validate_args=False).sample(),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_what_draws_is_drawn_in_each_step(kind):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.fixed = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, sigma, text):
            return self.lin(x) * sigma + DRAWS[kind](self.fixed(text))

    def loop(model, x, sigmas, text):
        for i in range(3):
            x = x + 0.1 * model(x, sigmas[i], text)
        return x

    args = (Noisy(), torch.randn(2, 4), torch.ones(3), torch.randn(2, 4))
    found = run_passes(loop, args, "canonicalize,find-steps,hoist-steps")
    assert len([node for node in found.gm.graph.nodes if ops.draws(node)]) == 3
    assert "draws random numbers" in found.notes[0].reason


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y: F.dropout(x, 0.5, False),
        lambda x, y: F.dropout(x, 0.0, True),
        lambda x, y: F.rrelu(x, training=False),
        lambda x, y: F.scaled_dot_product_attention(x, y, y),
        lambda x, y: F.scaled_dot_product_attention(x, y, y, dropout_p=0.0),
        lambda x, y: x.softmax(-1),
        lambda x, y: aten.scaled_dot_product_attention.default(x, y, y),
    ],
)
def test_what_does_not_draw(call, fn):
    assert not ops.draws(call(fn))


@pytest.mark.parametrize(
    "fn", [lambda n: int(n / 2), lambda n: sum([n, n, 1]), lambda n: max(n, 3)]
)
def test_sizes_are_not_drawn(trace, fn):
    def sized(x):
        return x.new_zeros(fn(x.shape[0]))

    gm = trace(sized, (torch.rand(6),), (torch.rand(8),))
    assert not any(map(ops.draws, gm.graph.nodes))


def test_attention_module_draws_by_its_dropout():
    def last(layer):
        gm = run_passes(lambda q: layer(q, q, q, need_weights=False)[0], (X[0],), "").gm
        return any(map(ops.draws, gm.graph.nodes))

    layer = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    assert last(layer.train())
    assert not last(layer.eval())


def test_operators_of_others_say_by_tag_or_argument_that_they_draw():
    with torch.library._scoped_library("lipass_draws", "FRAGMENT") as lib:
        tag = torch.Tag.nondeterministic_seeded
        for schema, tags in (
            ("tagged(Tensor x) -> Tensor", (tag,)),
            ("generated(Tensor x, Generator? generator) -> Tensor", ()),
            ("attend(Tensor x, float dropout_p) -> Tensor", ()),
            ("plain(Tensor x) -> Tensor", ()),
        ):
            lib.define(schema, tags=tags)
            name = schema.partition("(")[0]
            lib.impl(name, lambda x, *_: x.clone(), "CompositeExplicitAutograd")
        mine = torch.ops.lipass_draws
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        x.meta["example_value"] = X.to("meta")

        def drawn(target, *args):
            node = graph.call_function(target, (x, *args))
            node.meta["example_value"] = X.to("meta")
            return ops.draws(node)

        calls = [(mine.tagged.default,), (mine.tagged,), (mine.generated.default, None)]
        assert all(drawn(*call) for call in (*calls, (mine.attend.default, 0.1)))
        assert not drawn(mine.attend.default, 0.0)
        assert not drawn(mine.plain.default)


def test_body_of_a_subgraph_draws(trace):
    @torch.compiler.nested_compile_region
    def body(x):
        return F.dropout(x, 0.5) + 1

    gm = trace(lambda x: body(x) + body(x), (X,))
    assert sum(map(ops.draws, gm.graph.nodes)) == 2


def test_body_that_is_computed_again_draws(trace):
    def fn(x):
        return checkpoint(lambda y: F.dropout(y, 0.5) * 2, x, use_reentrant=False)

    assert sum(map(ops.draws, trace(fn, (X,)).graph.nodes)) == 1


@pytest.mark.parametrize(
    ("fn", "count"),
    [
        (lambda row: F.dropout(row, 0.5), 1),
        (lambda row: F.gumbel_softmax(row, 1.0), 1),
        (lambda row: torch.rand_like(row), 1),
        (lambda row: F.silu(row).sin() + 1, 0),
    ],
)
def test_what_draws_inside_of_a_vmap(trace, fn, count):
    def batched(x):
        return torch.vmap(fn, randomness="different")(x)

    assert sum(map(ops.draws, trace(batched, (X,)).graph.nodes)) == count


def test_random_call_that_nobody_reads_stays():
    def fn(x):
        torch.rand(2)
        return torch.flatten(x[None], 0, 1) * torch.rand(2, 1, 1, 1)

    found = run_passes(fn, (X,), "canonicalize")
    assert sum(map(ops.draws, found.gm.graph.nodes)) == 2


@pytest.mark.parametrize(
    ("fn", "written"),
    [
        (lambda x, y: x.add_(y), ["l_x_"]),
        (lambda x, y: operator.iadd(x, y), ["l_x_"]),
        (lambda x, y: x.__setitem__(0, y[0]), ["l_x_"]),
        (lambda x, y: torch.add(x, 1, out=y), ["l_y_"]),
        (lambda x, y: F.relu(x, True), ["l_x_"]),
        (lambda x, y: aten.mul_.Tensor(x, y), ["l_x_"]),
        (lambda x, y: torch._foreach_add_([x, y], 1), ["l_x_", "l_y_"]),
        (lambda x, y: F.relu(x), []),
        (lambda x, y: x.mul(y), []),
    ],
)
def test_forms_of_writing(trace, fn, written):
    gm = trace(fn, (X.clone(), Y.clone()))
    memory = {at for node in gm.graph.nodes for at in memory_written(node)}
    inputs = gm.graph.find_nodes(op="placeholder")
    assert [one.name for one in inputs if storage(one.meta["example_value"]) in memory] == written


def test_training_a_batch_norm_writes_to_its_statistics(trace):
    norm = nn.BatchNorm2d(3)
    writers = [node for node in trace(norm.train(), (X,)).graph.nodes if mutates(node)]
    assert writers
    assert not any(map(mutates, trace(norm.eval(), (X,)).graph.nodes))


@pytest.mark.parametrize(
    ("fn", "read"),
    [
        (lambda x, y: x.reshape_as(y), ["l_x_"]),
        (lambda x, y: x.expand_as(y), ["l_x_"]),
        (lambda x, y: x.type_as(y), ["l_x_"]),
        (lambda x, y: torch.zeros_like(y) * x, ["zeros_like", "l_x_"]),
        (lambda x, y: torch.zeros_like(y), []),
        (lambda x, y: x.new_ones(2), []),
        (lambda x, y: x.to(torch.float32) if y is None else x * y, ["l_x_", "l_y_"]),
    ],
)
def test_inputs_of_which_a_call_needs_the_numbers(call, fn, read):
    assert [node.name for node in ops.reads(call(fn))] == read


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, n: F.pad(x, (0, 0, 0, n.shape[0])),
        lambda x, n: F.interpolate(x, size=(n.shape[0], 8)),
    ],
)
def test_call_by_a_size_that_varies_is_known_and_logs_nothing(trace, fn, caplog):
    gm = trace(fn, (X.clone(), torch.randn(5)), grown=(X.clone(), torch.randn(6)))
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert calls
    assert not any(map(ops.draws, calls))
    assert "failed" not in caplog.text
