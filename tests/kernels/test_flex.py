"""FlexAttention as a provider of blocks that are runs of tokens."""

import pytest
import torch
from kernel_cases import make_case

import lipass.kernels.ops  # noqa: F401  (registers the operator)
from lipass.kernels import registry
from lipass.kernels.block_sparse import flex
from lipass.kernels.block_sparse.api import block_sparse_attention
from lipass.kernels.plan import BlockGrid, KvLayout

NAME = "lipass.kernels.block_sparse.flex"


def in_runs(role, frames, text, tile, **options):
    """Make a case whose tokens lie tile by tile."""
    case = make_case(role, frames, (5, 7), text, tile, dim=16, **options)
    for n, part in enumerate(case.layout.segments):
        if part.role != "text":
            grid = BlockGrid(part.grid.grid, tile, in_order=True)
            case.layout = case.layout.replace_grid(n, grid)
    case.q_grid = case.layout.segments[-1].grid
    return case


@pytest.fixture
def eager(monkeypatch):
    """Run it as it is written, without a compiler; it reads the mask alone then."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "_ready", {"cpu": ""})
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)


def attend(case, plan, provider, **options):
    return block_sparse_attention(
        case.q, case.keys, case.values, plan, provider=provider, scale=0.25, **options
    )


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("text", [0, 5, 16])
@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_same_as_the_definition(role, text):
    case = in_runs(role, 3, text, (1, 4, 4), budget=0.4)
    plan = case.plan()
    expected, log_sums = attend(case, plan, "reference", return_lse=True)
    out, lse = attend(case, plan, "flex", return_lse=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, log_sums, atol=1e-5, rtol=1e-5)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        (make_case("prefill", 2, (4, 6), 0, (1, 2, 2)), {}, "runs of tokens, got tiles"),
        (in_runs("prefill", 2, 5, (1, 2, 2)), {"key_bias": torch.zeros(1, 75)}, "takes no bias"),
    ],
)  # fmt: skip
def test_refusals(case, options, reason):
    with pytest.raises(ValueError, match=reason):
        attend(case, case.plan(), "flex", **options)


def test_nothing_is_compiled_in_a_frame(monkeypatch):
    monkeypatch.setattr(flex, "_ready", {})
    case = in_runs("prefill", 2, 0, (1, 2, 2))
    with pytest.raises(ValueError, match="not compiled yet; call"):
        attend(case, case.plan(), "flex")


def test_it_is_no_provider_unless_it_is_named():
    names = {name for names in registry._PROVIDERS.values() for name in names}
    assert "flex" not in names


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_who_prefers_it_gets_it_where_it_takes_the_call():
    registry.reset_telemetry()
    x = torch.randn(1, 2, 48, 16)
    call = torch.ops.lipass.sparse_attention
    results = []
    for name, tile_order in (("runs", "current"), ("tiles", "")):
        with registry.prefer("block_sparse", "flex"), registry.force("sparse"):
            results.append(
                call(x, [x], [x], [2, 4, 6], [2, 4, 6], "current", [1, 2, 2], 0.99, 0.25, 0,
                     "self", None, name, tile_order=tile_order)
            )  # fmt: skip
    counts = registry.telemetry()
    assert counts["runs"].provider == "flex"
    assert counts["tiles"].provider != "flex"
    assert list(counts["tiles"].refusals) == [
        "flex: takes blocks that are runs of tokens, got tiles (1, 2, 2) of queries; "
        "sparse.tile_order puts them in order"
    ]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_a_form_that_drops_its_lists_is_refused(monkeypatch):
    """Without a compiler FlexAttention computes every pair that the mask lets through."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "_ready", {})
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    assert flex.prepare() == "drops the lists of blocks that it is given"
    case = in_runs("prefill", 2, 0, (1, 2, 2))
    with pytest.raises(ValueError, match="drops the lists"):
        attend(case, case.plan(), "flex")


def test_compiler_that_fails_is_a_reason(monkeypatch):
    def fail():
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(flex, "_ready", {})
    monkeypatch.setattr(flex, "_compiled", fail)
    assert flex.prepare() == "does not run here: no compiler"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_it_equals_the_native_provider():
    """The one test that compiles it: a decode call over text, history and its own chunk."""
    why = flex.prepare()
    if why:
        pytest.skip(why)
    case = in_runs("decode", 3, 5, (1, 4, 8), budget=0.4)
    case.q, *rest = (torch.cat([x, x], -1) for x in (case.q, *case.keys, *case.values))
    case.keys, case.values = rest[:3], rest[3:]
    plan = case.plan()
    assert isinstance(plan.kv, KvLayout)
    out = attend(case, plan, "flex")
    torch.testing.assert_close(out, attend(case, plan, None), atol=1e-5, rtol=1e-5)
