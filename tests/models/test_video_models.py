"""Attention over latents in models that nobody here wrote becomes sparse, or says why not."""

import pytest
import torch

pytest.importorskip("diffusers")

from video_zoo import VIDEO
from zoo import own_rounding

from lipass.kernels import registry
from lipass.receipt import current_report

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # Mochi asks for fp32 there
    # Some models leave a function to Python, of which the receipt tells.
    pytest.mark.filterwarnings("ignore:every call of a compiled model:lipass.LipassWarning"),
]

_SLOW = {"sana-wm", "ltx-2"}
_NAMES = [pytest.param(x, marks=pytest.mark.slow) if x in _SLOW else x for x in VIDEO]

# Attention over latents that is rewritten, and why other attention than cross is not. Equal
# layers share a block that Dynamo compiles once (HunyuanVideo 1.5).
REWRITTEN = {
    "wan": 2, "wan-vace": 4, "chrono-edit": 2, "skyreels-v2": 2, "anyflow": 2, "helios": 2,
    "cosmos": 2, "kandinsky-5": 2, "sana-wm": 4, "ltx": 2, "ltx-2": 2, "allegro": 2, "latte": 2,
    "cogvideox": 2, "consis-id": 2, "easy-animate": 2, "hunyuan-video": 2, "joy-image-edit": 2,
    "motif-video": 2, "sana-video": 0, "hunyuan-video-1.5": 0, "mochi": 0,
}  # fmt: skip
"""Sana-Video's is linear attention, and Mochi's runs in frames that Dynamo leaves to Python."""


def _run(name, **options):
    torch.manual_seed(0)
    model, inputs = VIDEO[name]()
    inputs |= {"return_dict": False}
    given = {"inner": "eager", **options}
    fast = torch.compile(model.eval(), backend="light_interaction", options=given)
    with torch.no_grad():
        expected, actual = model(**inputs)[0], fast(**inputs)[0]
    return model, inputs, expected, actual, list(current_report().sites.values())


@pytest.mark.parametrize("name", _NAMES)
def test_attention_over_latents_becomes_sparse(name):
    model, inputs, expected, actual, sites = _run(name, preset="sparse", **{"sparse.budget": 1.0})
    off = (actual - expected).abs().max()
    assert off <= 1e-5 or off <= own_rounding(model, inputs, expected)
    rewritten = [site for site in sites if site.action == "rewritten"]
    assert len(rewritten) == REWRITTEN[name], sites
    assert all(site.role == "self" and site.grid for site in rewritten)
    assert all(site.reason for site in sites)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, sites in REWRITTEN.items() if sites])
def test_all_runs_where_blocks_are_left_out(name):
    with registry.force("sparse"):
        *_, actual, sites = _run(name, preset="all", **{"sparse.tile": (1, 1, 2)})
    assert actual.isfinite().all()
    assert sum(site.action == "rewritten" for site in sites) == REWRITTEN[name]
    assert any(counts.density < 1 for counts in registry.telemetry().values())
