import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lipass.backend import inner_compile, light_interaction, pipeline_of
from lipass.config import Config
from lipass.receipt import current_report, reset_report

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Decode(nn.Module):
    """One attention over text, history and its own tokens, 4x4 tokens a latent."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, x, text, history, **options):
        q = self.lin(x.flatten(2).mT).unflatten(-1, (2, 8)).transpose(1, 2)
        key = torch.cat([text, history, q], 2)
        out = F.scaled_dot_product_attention(q, key, key, **options)
        return out.transpose(1, 2).flatten(2)


def inputs(n=8):
    return torch.randn(1, 16, 4, 4, 4), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 16 * n, 8)


def compiled(model, **options):
    return torch.compile(model, backend="light_interaction", options={"inner": "eager", **options})


def calls(config):
    return [one.name for one in pipeline_of(config)]


def test_torch_finds_the_backend_by_its_name_without_importing_lipass():
    code = (
        "import torch, sys; assert 'lipass' not in sys.modules;"
        "f = torch.compile(lambda x: x + 1, backend='light_interaction',"
        "options={'preset': 'off', 'inner': 'eager'}); print(f(torch.ones(1)).item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "2.0", done.stderr


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("preset", ["off", "exact", "cache"])
def test_exact_presets_equal_the_model(inner, preset):
    model = Decode().eval()
    fast = compiled(model, preset=preset, inner=inner)
    with torch.no_grad():
        for n in (8, 12, 16):
            args = inputs(n)
            torch.testing.assert_close(fast(*args), model(*args), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("preset", ["sparse", "all", "reference"])
def test_budget_one_equals_the_model(inner, preset):
    model = Decode().eval()
    fast = compiled(model, preset=preset, inner=inner, **{"sparse.budget": 1.0})
    with torch.no_grad():
        for n in (8, 12, 16):
            args = inputs(n)
            torch.testing.assert_close(fast(*args), model(*args), atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_exact_passes():
    model = Decode()
    x, text, history = inputs()
    compiled(model, preset="exact", inner="aot_eager")(x, text, history).sum().backward()
    actual, model.lin.weight.grad = model.lin.weight.grad, None
    model(x, text, history).sum().backward()
    torch.testing.assert_close(actual, model.lin.weight.grad, atol=1e-5, rtol=1e-5)


def test_mode_names_a_preset():
    model = Decode().eval()
    fast = torch.compile(lambda x: x + 1, backend="light_interaction", mode="off")
    assert pipeline_of(Config.resolve("exact")) == pipeline_of(
        Config.resolve(None, {"preset": "exact"})
    )
    assert fast is not model


def test_mode_and_options_exclude_each_other():
    with pytest.raises(RuntimeError, match=r"[Ee]ither mode or options"):
        torch.compile(
            Decode(), backend="light_interaction", mode="off", options={"inner": "eager"}
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presset": "off"}, "did you mean 'preset'"),
        ({"preset": "exakt"}, "did you mean 'exact'"),
        ({"inner": "inductr"}, "did you mean 'inductor'"),
        ({"sparse.budgte": 0.3}, "did you mean 'sparse.budget'"),
        ({"pipeline": "canonicalise"}, "did you mean 'canonicalize'"),
        ({"pipeline": "sparse-attention"}, "needs find-attention in front of it"),
    ],
)
def test_bad_options_are_refused(options, message):
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(ValueError, match=message):
        light_interaction(gm, [torch.ones(1)], options={"inner": "eager", **options})


def test_off_is_the_inner_compiler_and_nothing_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "lipass.compile.unit", None)
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    options = {"preset": "off", "inner": "eager"}
    assert light_interaction(gm, [torch.ones(1)], options=options).__self__ is gm
    assert (current_report().graphs, current_report().presets) == (1, ["off"])
    assert current_report().passes == []


def test_user_options_are_left_alone():
    options = {"preset": "off", "inner": "eager"}
    light_interaction(torch.fx.symbolic_trace(lambda x: x + 1), [torch.ones(1)], options=options)
    assert options == {"preset": "off", "inner": "eager"}


def test_inner_compiler_gets_the_graph():
    gm = torch.fx.symbolic_trace(lambda x: (x + 1,))
    assert inner_compile(gm, [torch.ones(1)], "eager")(torch.ones(1))[0].item() == 2


FACTS = ["canonicalize", "find-attention", "find-poses", "find-steps"]
EXACT = [*FACTS, "collapse-keys", "hoist-rows", "hoist-steps"]
SPARSE = ["sparse-attention", "nearest-blocks", "pool-history", "tile-order"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"preset": "exact"}, EXACT),
        ({"preset": "context"}, [*EXACT, "prune-context"]),
        ({"preset": "sparse"}, [*EXACT, *SPARSE]),
        ({"preset": "cache"}, [*EXACT, "guard-steps"]),
        (
            {"preset": "all"},
            [*EXACT, "prune-context", *SPARSE, "guard-steps"],
        ),
        ({"preset": "all", "sparse": False}, [*EXACT, "prune-context", "guard-steps"]),
        (
            {"preset": "sparse", "context": True},
            [*EXACT, "prune-context", *SPARSE],
        ),
        ({"pipeline": "canonicalize"}, ["canonicalize"]),
    ],
)
def test_sections_choose_the_passes(options, expected):
    """Whatever is chosen, keys stay in pieces, and layers are outlined last."""
    found = calls(Config.resolve(None, options))
    if "pipeline" not in options:
        assert found[-4:] == ["carry-floats", "avoid-faults", "hoist-calls", "share-blocks"]
        del found[-4:]
        found.remove("attend-pieces")
    assert found == expected


def test_options_reach_the_passes():
    config = Config.resolve(
        None,
        {
            "sparse.tile": (2, 4, 4),
            "sparse.budget_prefill": 0.6,
            "sparse.budget_decode": 0.2,
            "sparse.sink_latents": 2,
            "sparse.dense_layers": (0,),
            "sparse.token_grid": (8, 8),
            "context.overlap_min": 0.4,
            "context.sink_latents": 3,
            "context.window_chunks_max": 2,
            "hfov_deg": 70.0,
            "vfov_deg": 50.0,
            "near": 0.2,
            "far": 9.0,
        },
    )
    assert str(pipeline_of(config)) == (
        "canonicalize,find-attention{token_grid=8x8},find-poses,find-steps,collapse-keys,"
        "hoist-rows,hoist-steps,"
        "prune-context{overlap_min=0.4 sink_latents=3 window_latents=8 hfov_deg=70.0 "
        "vfov_deg=50.0 near=0.2 far=9.0},sparse-attention{tile=2x4x4 budget_prefill=0.6 "
        "budget_self=0.3 budget_decode=0.2 sink_latents=2 dense_layers=0},nearest-blocks,"
        "pool-history,tile-order,attend-pieces,guard-steps,carry-floats,avoid-faults,hoist-calls,share-blocks"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "canonicalize,find-attention,"),
        ({"strict": True}, "canonicalize{strict=true},find-attention{strict=true},"),
        ({"verify": "off"}, "canonicalize{verify=false},find-attention{verify=false},"),
        (
            {"verify": "off", "strict": True},
            "canonicalize{verify=false},find-attention{verify=false},",
        ),
    ],
)
def test_verify_reaches_the_passes_that_match(options, expected):
    text = str(pipeline_of(Config.resolve("exact", options)))
    assert text.startswith(expected)


def test_any_pass_can_be_left_out_by_name():
    every = [one.name for one in pipeline_of(Config.resolve("all"))]
    for name in ("share-blocks", "attend-pieces", "hoist-rows"):
        left = [one.name for one in pipeline_of(Config.resolve("all", {"disable": [name]}))]
        assert left == [one for one in every if one != name]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["share-block"], "did you mean 'share-blocks'"),
        (["find-attention"], "needs find-attention in front of it"),
    ],
)
def test_passes_that_cannot_be_left_out_are_named(names, message):
    with pytest.raises(ValueError, match=message):
        pipeline_of(Config.resolve("all", {"disable": names}))


def test_pipeline_text_beats_options():
    config = Config.resolve(
        None,
        {
            "pipeline": "canonicalize,find-attention,sparse-attention{budget_decode=0.9}",
            "sparse.budget": 0.1,
        },
    )
    assert "budget_decode=0.9" in str(pipeline_of(config))
    assert "budget_prefill=0.1" in str(pipeline_of(config))


def test_history_that_grows_compiles_twice():
    fast = compiled(Decode().eval(), preset="sparse")
    with torch.no_grad():
        for n in (4, 8, 12, 16, 20):
            fast(*inputs(n))
    report = current_report()
    assert (report.graphs, report.recompiles) == (2, 1)


def test_history_that_is_no_whole_number_of_latents_compiles_again():
    fast = compiled(Decode().eval(), preset="sparse")
    with torch.no_grad():
        for n in (4, 8, 12):
            fast(*inputs(n))
        x, text, history = inputs(8)
        fast(x, text, history[:, :, :-1])
    assert current_report().graphs == 3


def test_options_that_are_equal_do_not_compile_again():
    model = Decode().eval()
    with torch.no_grad():
        for _ in range(2):
            compiled(model, preset="exact")(*inputs())
    assert current_report().graphs == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_inductor_runs_what_the_passes_made():
    model = Decode().eval()
    fast = compiled(model, preset="all", inner="inductor", **{"sparse.budget": 1.0})
    with torch.no_grad():
        args = inputs()
        torch.testing.assert_close(fast(*args), model(*args), atol=1e-5, rtol=1e-5)


@pytest.fixture
def failing_pass(monkeypatch):
    """Let a pass do half of its work and fail."""
    from lipass.passes.exact.attend_pieces import AttendPieces

    def run(self, graph, ctx):
        node = next(n for n in graph.nodes if n.target is F.scaled_dot_product_attention)
        for _ in ctx.visit([node]):
            node.args = (node.args[0],) * 3
            raise KeyError("lost")

    monkeypatch.setattr(AttendPieces, "run", run)


@pytest.mark.usefixtures("failing_pass")
def test_pass_that_fails_is_left_out_and_the_receipt_says_so():
    reset_report()
    model, args = Decode().eval(), inputs()
    with torch.no_grad():
        assert torch.equal(compiled(model, preset="exact")(*args), model(*args))
    lines = current_report().table().splitlines()
    (line,) = [x for x in lines if "bisect" in x]
    assert line.startswith("without attend-pieces (ask `lipass bisect`): pass 'attend-pieces'")


@pytest.mark.usefixtures("failing_pass")
def test_pass_that_fails_is_an_error_under_strict():
    with pytest.raises(Exception, match="pass 'attend-pieces' failed on %"), torch.no_grad():
        compiled(Decode().eval(), preset="exact", strict=True)(*inputs())


@pytest.mark.parametrize("preset", ["exact", "sparse", "all"])
def test_default_dtype_of_bf16(preset):
    torch.set_default_dtype(torch.bfloat16)
    try:
        reset_report()
        model = Decode().eval()
        fast = compiled(model, preset=preset)
        with torch.no_grad():
            for n in (8, 12, 16):
                args = inputs(n)
                torch.testing.assert_close(fast(*args), model(*args), rtol=0.05, atol=0.05)
        assert not [one.failure for one in current_report().passes if one.failure]
    finally:
        torch.set_default_dtype(torch.float32)


def test_declared_range_of_lengths():
    model, args = Decode().eval(), inputs(4)
    torch._dynamo.mark_dynamic(args[2], 2, min=16, max=640)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, preset="sparse")(*args), model(*args))


def test_declared_range_of_heights():
    model, args = Decode().eval(), inputs(4)
    torch._dynamo.mark_dynamic(args[0], 3, min=2, max=64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, preset="sparse")(*args), model(*args))
