"""Models that nobody here wrote: found, listed, and left as they are to rounding."""

import pytest
import torch
from zoo import ZOO, own_rounding

import lipass
from lipass.kernels import registry
from lipass.passes import PIPELINES
from lipass.receipt import current_report

pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # Some models leave a function to Python, of which the receipt tells.
    pytest.mark.filterwarnings("ignore:every call of a compiled model:lipass.LipassWarning"),
]

_HOISTED = PIPELINES["exact"].replace("hoist-calls", "hoist-calls{work_min=0}")
BUDGET_ONE = {"preset": "all", "sparse.budget": 1.0, "context.overlap_min": 0.0}


@pytest.fixture(params=ZOO)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def made(name):
    model, inputs = ZOO[name]()
    return model.eval(), {**inputs, "return_dict": False}


@pytest.mark.parametrize("options", [{"preset": "exact"}, BUDGET_ONE], ids=["exact", "budget-one"])
def test_output_is_that_of_the_model(made, options):
    model, inputs = made
    fast = torch.compile(
        model, backend="light_interaction", options={"inner": "aot_eager", **options}
    )
    with torch.no_grad():
        expected, actual = model(**inputs)[0], fast(**inputs)[0]
    assert (actual - expected).abs().max() <= max(1e-5, own_rounding(model, inputs, expected))


def test_every_attention_is_listed_with_its_grid_or_the_reason(name, made):
    model, inputs = made
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def count(*args, **kwargs):
        calls.append(1)
        return sdpa(*args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = count
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = sdpa
    fast = torch.compile(
        model, backend="light_interaction", options={"preset": "all", "inner": "eager"}
    )
    with torch.no_grad():
        fast(**inputs)
    sites = current_report().sites.values()
    assert len(sites) == len(calls) > 0
    assert all(site.grid or site.reason for site in sites)


@pytest.mark.parametrize("name", ["wan", "ltx", "sana-wm"], indirect=True)
def test_equal_layers_of_a_real_model_are_compiled_once(made):
    model, inputs = made
    fast = torch.compile(
        model, backend="light_interaction", options={"preset": "exact", "inner": "eager"}
    )
    with torch.no_grad():
        fast(**inputs)
    notes = [n for p in current_report().passes if p.name == "share-blocks" for n in p.notes]
    assert any("2 equal layers are compiled once" in note for note in notes), notes


def test_padding_of_a_prompt_is_one_key():
    """Wan pads prompts with zeros and does not mask them; all projections leave them equal."""
    model, inputs = ZOO["wan"]()
    prompt = torch.cat([torch.randn(1, 7, 16), torch.zeros(1, 505, 16)], 1)
    inputs |= {"encoder_hidden_states": prompt, "return_dict": False}
    fast = torch.compile(
        model.eval(), backend="light_interaction", options={"preset": "exact", "inner": "eager"}
    )
    registry.reset_telemetry()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(**inputs)[0], model(**inputs)[0], atol=1e-5, rtol=1e-5)
    merged = [s for s in lipass.report().sites.values() if s.provider == "merged"]
    assert [site.density for site in merged] == [8 / 512] * 2
    assert {site.action for site in merged} == {"rewritten"}


def test_prompt_of_a_real_model_is_projected_once():
    model, inputs = ZOO["wan"]()
    inputs |= {"return_dict": False}
    fast = torch.compile(
        model.eval(),
        backend="light_interaction",
        options={
            "preset": "exact",
            "inner": "eager",
            "pipeline": _HOISTED,
            "counted_writes": True,
        },
    )
    with torch.no_grad(), lipass.Session(preset="exact"):
        for step in range(4):
            inputs["timestep"] = torch.tensor([900 - step])
            torch.testing.assert_close(fast(**inputs)[0], model(**inputs)[0], atol=1e-5, rtol=1e-5)
    report = lipass.report()
    assert report.invariants_kept == 3 * report.invariants_computed > 0
