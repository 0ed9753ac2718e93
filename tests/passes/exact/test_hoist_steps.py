import itertools

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from lipass.passes.graph.marks import step_of

TEXT = "canonicalize,find-steps,hoist-steps"
SIGMAS = (1.0, 0.6, 0.0)


class Net(nn.Module):
    """Predict from the latents, their level and something that no step changes."""

    def __init__(self, fixed=None):
        super().__init__()
        self.lin, self.fixed = nn.Linear(4, 4), fixed or (lambda camera: camera.sin())

    def forward(self, x, sigma, camera):
        return self.lin(x + self.fixed(camera)) * sigma


X, S, CAMERA = torch.randn(2, 4), torch.tensor(SIGMAS), torch.randn(2, 4)


def euler(net):
    def fn(x, s, camera):
        for i, j in itertools.pairwise(range(len(SIGMAS))):
            x = x + (s[j] - s[i]) * net(x, s[i], camera)
        return x

    return fn


def count(gm, name):
    return len(gm.graph.find_nodes(op="call_method", target=name))


def test_what_no_step_changes_runs_once(trace, apply):
    records, _ = apply(trace(euler(Net()), (X, S, CAMERA)), TEXT)
    assert_expected_inline(
        records[-1].diff,
        """\
-%sin_1: f32[2, 4] = $camera.sin()  # @1
-%add_2: f32[2, 4] = add(%x, %sin_1)  # @1
+%add_2: f32[2, 4] = add(%x, %sin)  # @1
""",
    )
    assert records[-1].notes[0].reason == "1 of 4 calls run once instead of 2 times"


def test_loop_computes_the_same_to_the_bit(trace, apply):
    fn = euler(Net())
    gm = trace(fn, (X, S, CAMERA))
    compiled = torch.compile(fn, backend=lambda _, __: gm.forward)
    apply(gm, TEXT)
    with torch.no_grad():
        assert torch.equal(compiled(X, S, CAMERA), fn(X, S, CAMERA))


def test_hoisted_calls_are_part_of_no_step(trace, apply):
    gm = trace(euler(Net()), (X, S, CAMERA))
    apply(gm, "canonicalize,find-attention,find-steps,hoist-steps,guard-steps")
    assert count(gm, "sin") == 1
    assert count(gm.denoise_step, "sin") == 0


def test_a_view_goes_with_what_is_computed_from_it(trace, apply):
    gm = trace(euler(Net(lambda camera: camera.T.exp().T)), (X, S, CAMERA))
    apply(gm, TEXT)
    (exp,) = [node for node in gm.graph.nodes if node.target == "exp"]
    assert step_of(exp) is None
    assert step_of(exp.args[0]) is None


def only_views(camera):
    return camera.view(4, 2).reshape(2, 4)


def noisy(camera):
    return F.dropout(camera, 0.5, training=True)


def written_in_the_step(camera):
    return camera.sin().mul_(2)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (only_views, "every computation depends on the step"),
        (noisy, "draws random numbers"),
        (written_in_the_step, "every computation depends on the step"),
    ],
)
def test_near_misses_stay_as_they_are(fixed, message, trace, apply):
    records, _ = apply(trace(euler(Net(fixed)), (X, S, CAMERA)), TEXT)
    assert not records[-1].changed
    assert message in records[-1].notes[-1].reason


def test_input_that_is_written_to_between_steps_is_read_anew(trace, apply):
    net = Net()

    def fn(x, s, camera):
        camera = camera.clone()
        for i, j in itertools.pairwise(range(len(SIGMAS))):
            x = x + (s[j] - s[i]) * net(x, s[i], camera)
            camera.add_(1)
        return x

    gm = trace(fn, (X, S, CAMERA))
    apply(gm, TEXT)
    assert count(gm, "sin") == 2


def test_graph_without_a_loop_is_left_alone(trace, apply):
    records, _ = apply(trace(Net(), (X, S[0], CAMERA)), TEXT)
    assert not records[-1].changed
    assert not records[-1].notes
