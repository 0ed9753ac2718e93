import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lipass
from lipass.compile.dense_twin import pipeline_of_twin
from lipass.kernels import registry
from lipass.passes import PIPELINES
from lipass.passes.core import PassPipeline

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SPARSE = torch.ops.lipass.sparse_attention.default


class Decode(nn.Module):
    """Attend over text, history and its own tokens, where the cameras are an input."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, x, w2c, text, history):
        rows = x + w2c[:, -4:].mean((2, 3))[:, None, :, None, None]
        q = self.lin(rows.flatten(2).mT).unflatten(-1, (2, 8)).transpose(1, 2)
        key = torch.cat([text, history, q], 2)
        out = F.scaled_dot_product_attention(q, key, key)
        return out.transpose(1, 2).flatten(2).mT.unflatten(-1, (4, 4, 4)).contiguous()


X, TEXT = torch.randn(1, 16, 4, 4, 4), torch.randn(1, 2, 6, 8)
W2C = torch.eye(4).repeat(24, 1, 1)
W2C[:, 0, 3] = torch.linspace(0, 2, 24)


def history(latents):
    return torch.randn(1, 2, 16 * latents, 8, generator=torch.Generator().manual_seed(latents))


def cameras(latents):
    return W2C[None, : latents + 4]


@pytest.fixture
def ran(monkeypatch):
    """Record of each run of a compiled graph whether it holds sparse calls."""
    runs = []

    def compile_it(gm, example_inputs, inner):
        graphs = [m.graph for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
        sparse = any(g.find_nodes(op="call_function", target=SPARSE) for g in graphs)

        def run(*args):
            runs.append("rewritten" if sparse else "twin")
            return gm(*args)

        return run

    monkeypatch.setattr("lipass.backend.inner_compile", compile_it)
    return runs


def compiled(model, **options):
    fast = torch.compile(model, backend="light_interaction", options={"preset": "all", **options})
    with torch.no_grad():
        for latents in (4, 8):
            fast(X, cameras(latents), TEXT, history(latents))
    return fast


def call(fast, session, latents):
    query = W2C[latents : latents + 4]
    with session.chunk(poses=W2C[:latents], query=query) as chunk, torch.no_grad():
        kept = len(chunk.context)
        return fast(X, cameras(kept), TEXT, history(kept))


def test_short_contexts_run_the_models_own_attention(ran):
    model = Decode().eval()
    fast = compiled(model)
    ran.clear()
    with lipass.Session(preset="all") as session, torch.no_grad():
        out = call(fast, session, 8)
        assert torch.equal(out, model(X, cameras(8), TEXT, history(8)))
    assert ran == ["twin"]


def test_own_attention_is_counted_as_the_rewritten_call_would_be(ran):
    fast = compiled(Decode().eval())
    registry.reset_telemetry()
    with lipass.Session(preset="all") as session:
        call(fast, session, 8)
    (mine,) = registry.telemetry().values()
    registry.reset_telemetry()
    with registry.force("dense"), torch.no_grad():
        fast(X, cameras(8), TEXT, history(8))
    (expected,) = registry.telemetry().values()
    assert ran[-2:] == ["twin", "rewritten"]
    for field in ("site", "role", "calls", "dense_calls", "total_blocks", "visited_blocks"):
        assert getattr(mine, field) == getattr(expected, field), field
    assert mine.reason == "context of 8 latents, 128 tokens <= sparse.dense_tokens 640"


class Frames(nn.Module):
    """All frames attend to each other; there is no history."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, x):
        q = self.lin(x.flatten(2).mT).unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q * 2, q * 3)


def test_attention_without_history_is_sparse_whatever_the_history_of_a_session(ran):
    options = {"preset": "sparse", "sparse.tile": (1, 2, 2)}
    fast = torch.compile(Frames().eval(), backend="light_interaction", options=options)
    with torch.no_grad(), lipass.Session(**options, **{"sparse.dense_chunks": 3}) as session:
        fast(X)
        registry.reset_telemetry()
        with session.chunk(poses=None, query=W2C[:4]):
            fast(X)
    (counts,) = registry.telemetry().values()
    assert ran == ["rewritten"] * 2
    assert counts.role == "self"
    assert "dense_" not in counts.reason


@pytest.mark.parametrize(
    ("graph", "session", "latents", "expected"),
    [
        ({}, {"preset": "all"}, 8, "twin"),
        ({"sparse.dense_tokens": 127}, {"preset": "all"}, 8, "rewritten"),
        ({"sparse.dense_tokens": 128}, {"preset": "all"}, 8, "twin"),
        ({"sparse.dense_tokens": 0}, {"preset": "all", "sparse.dense_chunks": 3}, 8, "twin"),
        # No session context: the mask of the graph decides, and it may drop frames.
        ({"sparse.dense_tokens": 1000}, {"preset": "sparse"}, 8, "rewritten"),
        ({}, {"preset": "cache"}, 8, "rewritten"),
    ],
)
def test_twin_runs_only_where_nothing_is_left_out(graph, session, latents, expected, ran):
    fast = compiled(Decode().eval(), **graph)
    ran.clear()
    with lipass.Session(**session) as opened:
        call(fast, opened, latents)
    assert ran == [expected]


def test_first_steps_run_the_models_own_attention(ran):
    options = {"preset": "sparse", "sparse.dense_tokens": 0}
    fast = compiled(Decode().eval(), **options, **{"sparse.dense_steps": 2})
    ran.clear()
    registry.reset_telemetry()
    with lipass.Session(**options) as session, torch.no_grad():
        latents = torch.randn(8, 16, 4, 4)
        with session.chunk(latents=latents) as chunk:
            for _ in chunk.steps([1.0, 0.9, 0.5, 0.2, 0.0]):
                fast(X, cameras(8), TEXT, history(8))
            fast(X, cameras(8), TEXT, history(8))
    assert ran == ["twin"] * 2 + ["rewritten"] * 3
    (counts,) = registry.telemetry().values()
    assert counts.calls == 5


def test_budget_one_leaves_only_the_mask_which_the_session_has_decided(ran):
    fast = compiled(Decode().eval(), preset="context")
    ran.clear()
    with lipass.Session(preset="context") as session:
        call(fast, session, 16)
    assert ran == ["twin"]


def test_calls_outside_of_a_session_run_the_rewritten_graph(ran):
    fast = compiled(Decode().eval())
    ran.clear()
    with torch.no_grad():
        fast(X, cameras(8), TEXT, history(8))
    assert ran == ["rewritten"]


def test_steps_of_an_unrolled_loop_are_counted_as_often_as_they_compute():
    class Timed(Decode):
        def forward(self, x, sigma, *rest):
            return super().forward(x * sigma, *rest)

    model = Timed().eval()

    def loop(x, w2c, text, past):
        for sigma, sigma_next in itertools.pairwise((1.0, 0.9, 0.7, 0.4, 0.0)):
            x = x + (sigma_next - sigma) * model(x, torch.tensor(sigma), w2c, text, past)
        return x

    fast = compiled(loop, inner="eager")
    registry.reset_telemetry()
    options = {"preset": "all", "steps.overlap_min": 0.0, "steps.departure_min": 0.0}
    with lipass.Session(**options) as session:
        call(fast, session, 8)
    assert sum(counts.calls for counts in registry.telemetry().values()) == 2


@pytest.mark.parametrize("preset", ["off", "exact", "cache"])
def test_pipelines_that_leave_nothing_out_have_no_twin(preset):
    assert pipeline_of_twin(PassPipeline.parse(PIPELINES[preset])) is None


def test_twin_keeps_steps_and_shared_layers():
    passes = pipeline_of_twin(PassPipeline.parse(PIPELINES["all"]))
    behind = ["carry-floats", "avoid-faults", "hoist-calls", "share-blocks"]
    assert [one.name for one in passes][-5:] == ["guard-steps", *behind]
