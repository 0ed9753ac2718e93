import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lipass
from lipass.compile.dense_twin import DenseTwin
from lipass.compile.unit import CompiledUnit
from lipass.kernels import registry
from lipass.receipt import current_report

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SIGMAS = (1.0, 0.9, 0.7, 0.4, 0.0)


class Decode(nn.Module):
    """A velocity from one attention over text, history and its own tokens."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, x, sigma, text, history, **options):
        q = self.lin(x.flatten(2).mT * sigma).unflatten(-1, (2, 8)).transpose(1, 2)
        key = torch.cat([text, history, q], 2)
        out = F.scaled_dot_product_attention(q, key, key, **options)
        return out.transpose(1, 2).flatten(2).mT.unflatten(-1, (4, 4, 4)).contiguous()


X = torch.randn(1, 16, 4, 4, 4)
CACHE = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 128, 8)
W2C = torch.eye(4).repeat(8, 1, 1)
OPTIONS = {"preset": "all", "inner": "eager", "sparse.budget": 1.0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Decode().eval()


@pytest.fixture
def counted(monkeypatch):
    """Count how often a compiled graph runs."""
    runs = []

    def count(gm, example_inputs, inner):
        def run(*args):
            runs.append(1)
            return gm(*args)

        return run

    monkeypatch.setattr("lipass.backend.inner_compile", count)
    return runs


def compiled(model, **options):
    # a first call with another length makes the history dynamic, which tells it from text
    fast = torch.compile(model, backend="light_interaction", options={**OPTIONS, **options})
    with torch.no_grad():
        for n in (64, 128):
            fast(X, torch.tensor(1.0), CACHE[0], torch.randn(1, 2, n, 8))
    return fast


def sample(model, steps):
    """Take Euler steps of `(sigma, sigma_next)`."""
    x = X
    with torch.no_grad():
        for sigma, sigma_next in steps:
            x = x + (sigma_next - sigma) * model(x, torch.tensor(sigma), *CACHE)
    return x


def pairs(sigmas):
    return list(itertools.pairwise(sigmas))


def chunk(session):
    return session.chunk(poses=W2C[:8], query=W2C[:4])


def reusing(**options):
    return lipass.Session(**{"preset": "cache", "steps.overlap_min": 0.0, **options})


@pytest.mark.parametrize("form", ["merge", "lookup"])
def test_reused_steps_equal_the_shorter_list_of_sigmas(model, form):
    fast = compiled(model)
    with reusing(**{"steps.form": form}) as session, chunk(session) as now:
        x = sample(fast, ((step.sigma, step.sigma_next) for step in now.steps(SIGMAS)))
    expected = sample(model, pairs((1.0, 0.4, 0.0)))
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_reused_steps_do_not_run(model, counted):
    fast = compiled(model)
    counted.clear()
    with reusing(**{"steps.form": "lookup"}) as session, chunk(session) as now:
        sample(fast, ((step.sigma, step.sigma_next) for step in now.steps(SIGMAS)))
    assert len(counted) == 2
    assert now.lookups == 2


def test_calls_outside_of_a_session_run(model, counted):
    fast = compiled(model)
    counted.clear()
    sample(fast, pairs(SIGMAS))
    assert len(counted) == 4


def test_calls_outside_of_steps_run(model, counted):
    fast = compiled(model)
    counted.clear()
    with reusing() as session, chunk(session):
        sample(fast, pairs(SIGMAS))
    assert len(counted) == 4


def test_chunks_do_not_share_stored_outputs(model):
    fast = compiled(model)
    with reusing(**{"steps.form": "lookup"}) as session:
        for sigmas in (SIGMAS, tuple(2 * sigma for sigma in SIGMAS)):
            with chunk(session) as now:
                x = sample(fast, ((step.sigma, step.sigma_next) for step in now.steps(sigmas)))
            expected = sample(model, pairs((sigmas[0], sigmas[3], sigmas[4])))
            torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_writing_to_an_output_does_not_change_the_stored_one(model):
    fast = compiled(model)
    seen = []
    with reusing(**{"steps.form": "lookup"}) as session, chunk(session) as now, torch.no_grad():
        for _ in now.steps(SIGMAS):
            out = fast(X, torch.tensor(1.0), *CACHE)
            seen.append(out.clone())
            out.zero_()
    for out in seen[1:3]:
        assert torch.equal(out, seen[0])


def test_graph_that_is_no_step_runs_in_reused_steps(counted):
    fast = torch.compile(lambda x: x * 2, backend="light_interaction", options=OPTIONS)
    fast(torch.ones(1))
    counted.clear()
    with reusing(**{"steps.form": "lookup"}) as session, chunk(session) as now:
        results = [fast(torch.tensor([s.sigma])).item() for s in now.steps(SIGMAS)]
    assert results == pytest.approx([2 * sigma for sigma in SIGMAS[:-1]])


def unrolled(model, sigmas=SIGMAS):
    def fn(x, *cache):
        for sigma, sigma_next in pairs(sigmas):
            x = x + (sigma_next - sigma) * model(x, torch.tensor(sigma), *cache)
        return x

    return fn


def compiled_loop(model, **options):
    fast = torch.compile(
        unrolled(model), backend="light_interaction", options={**OPTIONS, **options}
    )
    with torch.no_grad():
        for n in (64, 128):
            fast(X, CACHE[0], torch.randn(1, 2, n, 8))
    return fast


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_unrolled_loop_outside_of_a_session_equals_the_model(model, inner):
    fast = compiled_loop(model, inner=inner)
    with torch.no_grad():
        torch.testing.assert_close(
            fast(X, *CACHE), sample(model, pairs(SIGMAS)), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("form", ["merge", "lookup"])
def test_reused_steps_of_an_unrolled_loop_equal_the_shorter_list(model, form):
    fast = compiled_loop(model)
    with reusing(**{"steps.form": form}) as session, chunk(session) as now, torch.no_grad():
        x = fast(X, *CACHE)
    assert now.plan.steps.reused == (1, 2)
    assert now.lookups == 2
    expected = sample(model, pairs((1.0, 0.4, 0.0)))
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_steps_of_an_unrolled_loop_are_compiled_once(model, monkeypatch):
    seen = []

    def count(gm, example_inputs, inner):
        seen.append(gm)
        return gm.forward

    monkeypatch.setattr("lipass.backend.inner_compile", count)
    options = {"preset": "cache", "inner": "eager"}
    fast = torch.compile(unrolled(model), backend="light_interaction", options=options)
    with torch.no_grad():
        fast(X, *CACHE)
    assert len(seen) == 1


def test_unrolled_loop_compiles_once_for_all_lengths(model):
    fast = compiled_loop(model)
    with torch.no_grad():
        for n in (96, 160, 192):
            fast(X, CACHE[0], torch.randn(1, 2, n, 8))
    assert current_report().graphs == 2


def test_chunks_that_stay_dense_are_forced_dense(model, monkeypatch):
    # Another session's mask is in the graph, so that no twin may run.
    monkeypatch.setattr(DenseTwin, "why_dense", lambda twin, chunk, short: None)
    fast = compiled(model, **{"sparse.budget": 0.3, "sparse.dense_tokens": 0})
    routes = []
    force = registry.force

    def spy(route, reason, **rest):
        routes.append((route, reason))
        return force(route, reason, **rest)

    monkeypatch.setattr(registry, "force", spy)
    with lipass.Session(**{"preset": "sparse", "sparse.dense_chunks": 2}) as session:
        for latents in (4, 8):
            now = session.chunk(poses=W2C[:latents], query=W2C[:4])
            with now, torch.no_grad():
                fast(X, torch.tensor(1.0), *CACHE)
    assert routes == [("dense", "history of 1 chunks < sparse.dense_chunks 2")]


@pytest.mark.parametrize(("preset", "expected"), [("context", 1.0), ("cache", 0.0)])
def test_graph_scores_no_views_that_the_session_has_scored(preset, expected):
    behind = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])).repeat(1, 3, 1, 1)

    def score():
        return torch.ops.lipass.view_overlap(W2C[None, :4], behind, 60.0, 35.0, 0.5, 8.0)

    unit = CompiledUnit(score)
    assert (unit() == 0).all()
    with lipass.Session(preset=preset) as session, chunk(session):
        assert (unit() == expected).all()
    assert (unit() == 0).all()


def test_report_lists_sites_and_passes(model):
    compiled(model)
    report = current_report()
    site = report.sites["attention:decode"]
    assert (site.role, site.action, site.grid) == ("decode", "rewritten", (4, 4, 4))
    assert site.segments == ("text", "history", "current")
    assert site.source.startswith("test_unit.py:")
    names = [record.name for record in report.passes]
    assert names[:2] == ["canonicalize", "find-attention"]
    assert report.graphs == 2
    assert report.compile_s > 0


class Layers(nn.Module):
    """Two equal layers, each with a cache of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Decode() for _ in range(2))

    def forward(self, x, sigma, text, history):
        for layer in self.layers:
            x = x + layer(x, sigma, text, history)
        return x


def test_layers_compiled_once_have_a_receipt_each():
    model = Layers().eval()
    fast = compiled(model, pipeline="canonicalize,find-attention,sparse-attention,share-blocks")
    registry.reset_telemetry()
    with torch.no_grad():
        for _ in range(3):
            fast(X, torch.tensor(1.0), *CACHE)
    names = ["layers.0:decode", "layers.1:decode"]
    assert [current_report().sites[name].action for name in names] == ["rewritten"] * 2
    assert {name: registry.telemetry()[name].calls for name in names} == dict.fromkeys(names, 3)


def test_dense_layers_compiled_once_are_counted_apart(monkeypatch):
    class Cross(nn.Module):
        def forward(self, x, text):
            key = torch.cat([text, text + x.mean()], 2)
            return x + F.scaled_dot_product_attention(x * 2, key, key)

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Cross() for _ in range(2))

        def forward(self, x, text):
            for layer in self.layers:
                x = layer(x, text)
            return x

    monkeypatch.setattr("lipass.kernels.pieces.why_joined", lambda *sizes: None)
    text = "canonicalize,find-attention,attend-pieces,share-blocks{nodes_min=2}"
    options = {"pipeline": text, "inner": "eager"}
    fast = torch.compile(Stack(), backend="light_interaction", options=options)
    registry.reset_telemetry()
    with torch.no_grad():
        fast(CACHE[0], CACHE[0].clone())
    calls = {name: counts.calls for name, counts in registry.telemetry().items()}
    assert len(calls) == 2, calls
    assert set(calls.values()) == {1}


def test_layers_are_counted_from_the_first_one_after_a_call_that_failed():
    with registry.one_call():
        assert registry.site_of_call("a,b") == "a"
    with registry.one_call():
        assert [registry.site_of_call("a,b") for _ in range(2)] == ["a", "b"]
    assert registry.site_of_call("a,b") == "a"


def test_report_says_why_a_site_is_kept(model):
    fast = torch.compile(model, backend="light_interaction", options=OPTIONS)
    with torch.no_grad():
        fast(X, torch.tensor(1.0), *CACHE, dropout_p=0.1)
    site = current_report().sites["attention"]
    assert (site.action, site.reason) == ("kept", "other: dropout is 0.1")


def test_report_of_a_pipeline_without_rewrites(model):
    compiled(model, pipeline="canonicalize,find-attention")
    site = current_report().sites["attention:decode"]
    assert (site.action, site.reason) == ("kept", "no pass of the pipeline rewrites attention")


def test_strict_raises_where_a_site_stays_dense(model):
    fast = torch.compile(model, backend="light_interaction", options={**OPTIONS, "strict": True})
    with torch.no_grad(), pytest.raises(Exception, match="1 that stay dense") as failure:
        fast(X, torch.tensor(1.0), *CACHE, dropout_p=0.1)
    assert "dropout is 0.1" in str(failure.value)
    assert "LipassError" in str(failure.value)


def test_strict_accepts_cross_attention_and_dense_layers(model):
    def fn(x, text):
        q = x.flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, text, text)

    options = {**OPTIONS, "strict": True}
    torch.compile(fn, backend="light_interaction", options=options)(X, CACHE[0])
    compiled(model, preset="sparse", **{"sparse.dense_layers": (0,)})


def test_strict_says_nothing_where_attention_is_to_stay_dense(model):
    fast = torch.compile(
        model,
        backend="light_interaction",
        options={"preset": "cache", "inner": "eager", "strict": True},
    )
    with torch.no_grad():
        fast(X, torch.tensor(1.0), *CACHE, dropout_p=0.1)


def test_failing_pass_names_itself(model, monkeypatch):
    def fail(self, graph, ctx):
        raise KeyError("lost")

    monkeypatch.setattr("lipass.passes.facts.canonicalize.Canonicalize.run", fail)
    with pytest.raises(Exception, match="pass 'canonicalize' failed: 'lost'"):
        compiled(model, strict=True)
    compiled(model)
    assert "without canonicalize (ask `lipass bisect`)" in lipass.report().table()
