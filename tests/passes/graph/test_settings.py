"""What a model sets for the calls behind holds for the same calls after every pass."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import lipass
from lipass.passes.graph.settings import chosen_kernel, is_setting, scopes
from lipass.testing import run_passes

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X = torch.randn(1, 2, 4, 8)


def fused_kernels(fn, preset="exact"):
    """Count the fused attention kernels of a compiled call."""
    options = {"preset": preset, "inner": "aot_eager"}
    fast = torch.compile(fn, backend="light_interaction", options=options)
    with torch.no_grad():
        expected, _ = fn(X), fast(X)
        with profile(activities=[ProfilerActivity.CPU]) as ran:
            torch.testing.assert_close(fast(X), expected)
    return sum("dot_product_flash_attention" in event.name for event in ran.events())


def attend(x):
    # a spelling that canonicalize changes
    return F.scaled_dot_product_attention(query=x, key=x, value=torch.flatten(x[None], 0, 1))


def chosen(x):
    with sdpa_kernel(SDPBackend.MATH):
        return attend(x)


def chosen_in_between(x):
    x = attend(x)
    with sdpa_kernel([SDPBackend.MATH]):
        x = attend(x)
    return attend(x)


def chosen_in_another_choice(x):
    with sdpa_kernel(SDPBackend.MATH):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            x = attend(x)
        return attend(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        q = self.one(x).sin()
        with sdpa_kernel(SDPBackend.MATH):
            out = attend(q)
        return self.two(torch.tanh(x + out) * 2 + 1) * 0.5


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Around(Blocks):
    def forward(self, x):
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(x)


@pytest.mark.parametrize("preset", ["exact", "all"])
@pytest.mark.parametrize(
    ("fn", "count"),
    [(attend, 1), (chosen, 0), (chosen_in_between, 2), (chosen_in_another_choice, 1)],
)
def test_choice_of_a_kernel_holds_where_it_was_made(fn, count, preset):
    assert fused_kernels(fn, preset) == count


@pytest.mark.parametrize("kind", [Blocks, Around])
def test_choice_of_a_kernel_holds_in_layers(kind):
    assert fused_kernels(kind().eval()) == 0


@pytest.mark.parametrize("kind", [Blocks, Around])
def test_layers_in_a_choice_of_kernels_are_not_shared(kind):
    found = run_passes(kind().eval(), (X,), "canonicalize,find-attention,share-blocks")
    assert found.notes
    assert all("sets something for" in note.reason for note in found.notes)


def test_sites_with_a_chosen_kernel_are_kept_with_the_reason():
    found = run_passes(chosen_in_between, (X,), "canonicalize,find-attention,attend-pieces")
    reasons = ["the user chose the kernel" in note.reason for note in found.notes]
    assert reasons == [False, True, False]


def test_nested_choices_are_pairs(trace):
    graph = trace(chosen_in_another_choice, (X,)).graph
    pairs = [(a.name, b.name) for a, b in scopes(graph)]
    assert pairs == [("_sdpa_kernel_1", "_sdpa_kernel_2"), ("_sdpa_kernel", "_sdpa_kernel_3")]
    calls = graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    assert all(chosen_kernel(node) for node in calls)


class Predictor(nn.Module):
    """Predict by attention with the kernel that the layer chooses."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x, level):
        return chosen(self.lin(x)) * level


def test_choice_of_a_kernel_holds_in_steps_of_one_body(trace, apply):
    net, levels = Predictor().eval(), torch.tensor([1.0, 0.5, 0.2, 0.0])

    def loop(x):
        for i in range(3):
            x = x + (levels[i + 1] - levels[i]) * net(x, levels[i])
        return x

    gm = trace(loop, (X,))
    apply(gm, "canonicalize,find-attention,find-steps,hoist-steps,guard-steps")
    assert len([node for node in gm.denoise_step.graph.nodes if is_setting(node)]) == 2
    assert not any(map(is_setting, gm.graph.nodes))
    assert fused_kernels(loop, "cache") == 0


def deterministic(x):
    torch.use_deterministic_algorithms(True)
    y = x + 1
    torch.use_deterministic_algorithms(False)
    return y


def precision(x):
    torch.set_float32_matmul_precision("high")
    y = x @ x.mT
    torch.set_float32_matmul_precision("highest")
    return y


def default_dtype(x):
    torch.set_default_dtype(torch.float64)
    y = torch.ones(2)
    torch.set_default_dtype(torch.float32)
    return y, x


def flash_off(x):
    torch.backends.cuda.enable_flash_sdp(False)
    y = attend(x)
    torch.backends.cuda.enable_flash_sdp(True)
    return y


def no_grad(x):
    with torch.enable_grad():
        y = x * 2
    with torch.no_grad():
        return y * 2


def inference(x):
    with torch.inference_mode():
        return x * 2


def autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x.mT


def batched(x):
    return torch.vmap(lambda row: row.sin())(x)


def differentiated(x):
    return torch.func.grad(lambda row: row.sin().sum())(x)


@pytest.mark.parametrize(
    "fn",
    [
        *(chosen, chosen_in_between, deterministic, precision, default_dtype, flash_off),
        *(no_grad, inference, autocast, batched, differentiated),
    ],
)
def test_dead_code_removal_keeps_what_sets_something(trace, fn):
    def padded(x):
        y = torch.flatten(x, 0, 0)  # is removed, so dead code is looked for
        return fn(y + 1)

    def unread(graph):
        calls = [node for node in graph.nodes if node.op.startswith("call") and not node.users]
        return [
            node.target.__name__
            for node in calls
            if not isinstance(node.meta.get("example_value"), torch.Tensor)
        ]

    before = unread(trace(padded, (X,)).graph)
    found = run_passes(padded, (X,), "canonicalize")
    assert found.records[-1].changed
    assert unread(found.gm.graph) == before


def test_settings_are_told_from_what_changes_no_number(trace):
    def names(fn):
        return [node.name for node in trace(fn, (X,)).graph.nodes if is_setting(node)]

    assert names(chosen) == ["_sdpa_kernel", "_sdpa_kernel_1"]
    assert len(names(precision)) == len(names(deterministic)) == len(names(flash_off)) == 2
    assert not any(map(names, (no_grad, inference, autocast, batched, attend)))


def test_products_under_a_setting_are_not_kept_between_calls():
    lin = nn.Linear(64, 64)

    def fn(x):
        torch.set_float32_matmul_precision("high")
        return x + lin(lin.weight @ lin.weight).sum()

    options = {"hoist-calls": {"work_min": 1}}
    pipeline = lipass.passes.core.PassPipeline.parse(
        "canonicalize,find-attention,find-poses,find-steps,hoist-calls", options
    )
    found = run_passes(fn, (torch.randn(64, 64),), pipeline)
    assert [note.action for note in found.notes] == ["kept"]
