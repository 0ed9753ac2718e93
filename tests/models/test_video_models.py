"""Attention over latents in models that nobody here wrote becomes sparse, or says why not."""

import contextlib

import pytest
import torch

pytest.importorskip("diffusers")

import model_table
from model_table import MODELS, ROWS
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from zoo import own_rounding

import lipass
from lipass.kernels import registry
from lipass.receipt import current_report

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # Mochi asks for fp32 there
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor"),  # SkyReels, its fps
    pytest.mark.filterwarnings("ignore:flex_attention called without"),  # the model as it is
    # torch's own, where it makes a mask of FlexAttention
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # Some models leave a function to Python, of which the receipt tells.
    pytest.mark.filterwarnings("ignore:every call of a compiled model:lipass.LipassWarning"),
]

_NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if row.slow else name for name, row in ROWS.items()
]


def _run(name, **options):
    torch.manual_seed(0)
    row = ROWS[name]
    model, inputs = MODELS[name]()
    inputs |= {"return_dict": False}
    given = {"inner": "eager", **row.options, **options}
    with torch.no_grad():
        expected = model.eval()(**inputs)[0]
        with lipass.adopt(model) if row.adopt else contextlib.nullcontext():
            fast = torch.compile(model, backend="light_interaction", options=given)
            actual = fast(**inputs)[0]
    return model, inputs, expected, actual, list(current_report().sites.values())


def test_every_model_that_is_tried_is_in_the_table():
    assert ROWS.keys() == MODELS.keys()


def test_the_page_shows_the_table():
    """`python tests/models/model_table.py` writes it."""
    assert model_table.shown() == model_table.table()


@pytest.mark.parametrize("name", _NAMES)
def test_attention_over_latents_becomes_sparse(name):
    model, inputs, expected, actual, sites = _run(name, preset="sparse", **{"sparse.budget": 1.0})
    off = (actual - expected).abs().max()
    assert off <= 1e-5 or off <= own_rounding(model, inputs, expected)
    rewritten = [site for site in sites if site.action == "rewritten"]
    assert len(rewritten) == ROWS[name].rewritten, sites
    role = "decode" if name == "anyflow-far-step" else "self"
    assert all(site.role == role and site.grid for site in rewritten)
    assert all(site.reason for site in sites)
    assert any(ROWS[name].reason in site.reason for site in sites)


class Attended(TorchFunctionMode):
    """Notes how many queries and keys each attention has, in whichever way it is computed."""

    def __init__(self):
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]
        if func is F.scaled_dot_product_attention:
            self.seen.append(tuple(one.shape[-2] for one in given[:2]))
        elif getattr(func, "__name__", "") in ("softmax", "_softmax"):
            self.seen.append(tuple(given[0].shape[-2:]))
        return func(*args, **(kwargs or {}))


def test_latents_that_stay_without_a_reason_in_the_receipt_have_no_scores():
    (name,) = [name for name, row in ROWS.items() if not row.rewritten and not row.reason]
    model, inputs = MODELS[name]()
    latents, (_, words, _) = inputs["hidden_states"], inputs["encoder_hidden_states"].shape
    tokens = latents[0, 0].numel() // 4  # patches of 2 x 2
    with torch.no_grad(), Attended() as attended:
        model.eval()(**inputs)
    assert set(attended.seen) == {(tokens, words)}  # to the prompt, and nothing else
    assert any("attn1" in path for path, _ in model.named_modules())
    assert "self-attention is linear" in ROWS[name].why


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.rewritten])
def test_all_runs_where_blocks_are_left_out(name):
    with registry.force("sparse"):
        *_, actual, sites = _run(name, preset="all", **{"sparse.tile": (1, 1, 2)})
    assert actual.isfinite().all()
    assert sum(site.action == "rewritten" for site in sites) == ROWS[name].rewritten
    assert any(counts.density < 1 for counts in registry.telemetry().values())
