"""Sorted keys on the streaming model: exact where nothing is left out, and no graph a chunk."""

import pytest
import torch

import lipass
from lipass.examples.tinyworld.model import CHUNK_LATENTS, ModelConfig, tokenize
from lipass.examples.tinyworld.stream import StreamWorld
from lipass.examples.tinyworld.stream_rollout import GrownCache, RingCache, stream
from lipass.kernels import registry
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import current_report

TINY = ModelConfig(width=48, heads=1, blocks=2, rows=4, columns=4)
CHUNKS = 5
PATH = parse_trajectory("w-8,left-11", step_deg=9.0)[None, : CHUNKS * CHUNK_LATENTS]
OPTIONS = {
    "preset": "sparse", "inner": "eager", "sparse.choose": "buckets", "sparse.dense_tokens": 0,
    "sparse.tile": (1, 4, 4), "nearest-blocks.query_block": 16,
    "find-attention.segments": ("text", "history", "current"), "sparse.token_grid": (4, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> StreamWorld:
    torch.manual_seed(0)
    tiny = StreamWorld(TINY)
    for parameter in tiny.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return tiny.eval().requires_grad_(False)


def roll_out(model, cache, call=None):
    given = torch.randn(1, 16, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    text = model.text(tokenize("a room at dusk")[None])
    return stream(model if call is None else call, text, given, PATH, seed=1, cache=cache)


def compiled(model, **options):
    torch._dynamo.reset()
    registry.reset_telemetry()
    return torch.compile(
        model, backend="light_interaction", options=OPTIONS | options, dynamic=True
    )


@pytest.mark.parametrize("form", ["grown", "ring"])
def test_rollout_that_leaves_nothing_out_equals_eager(model, form):
    def cache():
        return GrownCache() if form == "grown" else RingCache(model, CHUNKS)

    fast = compiled(model, **{"sparse.budget": 0.999})
    with registry.force("sparse"):
        made = roll_out(model, cache(), fast)
    assert torch.allclose(made, roll_out(model, cache()), rtol=1e-4, atol=1e-4)


def test_growing_history_compiles_nothing_after_two_chunks(model):
    fast, graphs = compiled(model, **{"sparse.budget": 0.2}), []

    def call(*args, **options):
        out = fast(*args, **options)
        graphs.append(current_report().graphs)
        return out

    session = {name: OPTIONS[name] for name in OPTIONS if name.startswith("sparse.")}
    with registry.force("sparse"), lipass.Session(preset="sparse", **session):
        roll_out(model, GrownCache(), call)
    assert graphs[3:] == [graphs[3]] * len(graphs[3:])
    decode = [site for site in registry.telemetry().values() if site.role == "decode"]
    assert sum(site.sparse_calls for site in decode) >= 4 * (CHUNKS - 2) * len(model.blocks)
    assert all(0.3 < site.density < 1.0 for site in decode)
