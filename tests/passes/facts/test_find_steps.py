import pytest
import torch
from torch import nn

from lipass.passes.graph.marks import step_of

TEXT = "canonicalize,find-steps"


@pytest.fixture
def found(trace, apply):
    def run(fn, args, grown=None):
        gm = trace(fn, args, grown)
        records, _ = apply(gm, TEXT)
        steps = {(s.index, s.steps) for node in gm.graph.nodes if (s := step_of(node))}
        (note,) = records[-1].notes
        return len(steps), note.reason

    return run


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x, sigma):
        return self.lin(x) * sigma


@pytest.fixture
def net():
    return Net()


X, S = torch.randn(2, 4), torch.rand(4)


def test_steps_of_a_chunk_behind_its_prefill(found, mini, inputs):
    assert found(mini.chunk, inputs(4).chunk) == (3, "3 steps: calls @1 to @3 of 4")


def test_steps_of_a_chunk_with_a_history_that_varies(found, mini, inputs):
    count, _ = found(mini.chunk, inputs(4).chunk, inputs(8).chunk)
    assert count == 3


def test_euler_loop(found, net):
    def fn(x, s):
        for i in range(3):
            x = x + (s[i + 1] - s[i]) * net(x, s[i])
        return x

    assert found(fn, (X, S)) == (3, "3 steps: calls @0 to @2 of 3")


def test_every_node_of_a_call_belongs_to_its_step(trace, apply, net):
    def fn(x, s):
        x = x + net(x, s[0])
        return x + net(x, s[1])

    gm = trace(fn, (X, S))
    apply(gm, TEXT)
    marked = [(n.target.__name__, step_of(n).index) for n in gm.graph.nodes if step_of(n)]
    assert marked == [("linear", 0), ("mul", 0), ("linear", 1), ("mul", 1)]


def test_loop_in_python(found, mini, inputs):
    assert found(mini, inputs(4).decode) == (0, "no module call is repeated")


def test_calls_with_other_constants(found, net):
    def fn(x, s):
        x = x + 0.5 * net(x, 0.9)
        return x + 0.5 * net(x, 0.6)

    count, reason = found(fn, (X, S))
    assert count == 0
    assert reason.startswith("calls of @0: %mul and %mul_")
    assert reason.endswith("differ")


def test_calls_with_other_shapes(found, net):
    def fn(x, s):
        y = net(x, s[0]).repeat(2, 1) + x.repeat(2, 1)
        return y + net(y, s[1])

    assert found(fn, (X, S)) == (0, "calls of @0: inputs %l_x_ and %y differ in shape or dtype")


def test_branches_of_classifier_free_guidance(found, net):
    def fn(x, s):
        return net(x, s[0]) - net(x, s[1])

    assert found(fn, (X, S)) == (0, "call @1 does not continue from @0")


def test_block_with_shared_weights(found, net):
    def fn(x, s):
        return net(net(x, s[0]), s[1])

    assert found(fn, (X, S)) == (0, "call @1 does not continue from @0")


def test_calls_of_different_modules(found):
    first, second = Net(), Net()

    def fn(x, s):
        x = x + first(x, s[0])
        return x + second(x, s[1])

    assert found(fn, (X, S)) == (0, "no module call is repeated")


def test_model_that_branches_on_the_step(found, net):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.net = net

        def forward(self, x, s):
            self.calls += 1
            y = self.net(x, s)
            return y.relu() if self.calls % 2 else y.sigmoid()

    branch = Branch()

    def fn(x, s):
        x = x + branch(x, s[0])
        return x + branch(x, s[1])

    count, reason = found(fn, (X, S))
    assert count == 0
    assert reason.endswith("differ")
