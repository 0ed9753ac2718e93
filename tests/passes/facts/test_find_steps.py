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


TOKENS = torch.randn(2, 4)


@pytest.mark.parametrize("given", ["embedding", "gain", "tokens"])
def test_calls_that_differ_in_more_than_a_noise_level(found, given):
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.rows = nn.Linear(4, 4), nn.Embedding(3, 4)
            self.gains = nn.ParameterList(torch.randn(1) for _ in range(3))

        def forward(self, x, sigma, given):
            return self.lin(x + given) * sigma

    model = Given()

    def fn(x, s, tokens):
        more = {"embedding": model.rows.weight, "gain": model.gains, "tokens": tokens}[given]
        for i in range(3):
            x = x + (s[i + 1] - s[i]) * model(x, s[i], more[i])
        return x

    count, reason = found(fn, (X, S, [TOKENS + i for i in range(3)]))
    assert count == 0
    assert "call @1 does not continue from @0: they differ in %" in reason
    assert "which is no noise level" in reason


def test_prompt_that_differs_from_step_to_step(found, mini, inputs):
    def fn(x, w2c, text, history):
        prompts = [text, [(k * 2, v) for k, v in text], [(k * 3, v) for k, v in text]]
        for i, sigma in enumerate((0.9, 0.6, 0.3)):
            x = x - 0.3 * mini(x, torch.full((1, 4), sigma), w2c, prompts[i], history)
        return x

    made = inputs(4)
    count, reason = found(fn, (made.noise, made.w2c, made.text, made.history))
    assert count == 0
    assert "which is no noise level" in reason


def test_level_that_is_embedded_in_front_of_the_call(found, net):
    time = nn.Linear(1, 4)

    def fn(x, s):
        for i in range(3):
            x = x + (s[i + 1] - s[i]) * net(x, time(s[i].view(1, 1)))
        return x

    assert found(fn, (X, S)) == (3, "3 steps: calls @0 to @2 of 3")


def test_tokens_that_layers_have_made(found, net):
    embed = nn.Linear(4, 4)

    def fn(x):
        h = embed(x)
        for i in range(3):
            h = h + net(h, torch.tensor(0.1 * (i + 1)))
        return h

    assert found(fn, (X,)) == (0, "what call @0 is given is made by layers and no sampler's")


def test_slopes_of_a_rule_of_third_order(found, net):
    def fn(x, s):
        a = net(x, s[0])
        b = net(x + (s[1] - s[0]) * a, s[1])
        c = net(x + (s[2] - s[0]) * b, s[2])
        return x + (s[2] - s[0]) * (a + 3 * c) / 4

    assert found(fn, (X, S)) == (0, "call @2 does not continue from @1")
