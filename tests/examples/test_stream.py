"""The streaming model: its cache in both forms, alone, in one forward, and through the backend."""

import re
from pathlib import Path

import pytest
import torch

from lipass.examples.tinyworld import stream as stream_module
from lipass.examples.tinyworld import stream_parallel, stream_rollout
from lipass.examples.tinyworld.metrics import psnr_db
from lipass.examples.tinyworld.model import CHUNK_LATENTS, ModelConfig, TinyWorld, tokenize
from lipass.examples.tinyworld.stream import StreamWorld
from lipass.examples.tinyworld.stream_parallel import forward_all
from lipass.examples.tinyworld.stream_rollout import GrownCache, RingCache, stream
from lipass.examples.tinyworld.stream_scores import way_back
from lipass.examples.tinyworld.weights import load_stream
from lipass.policy.trajectory import parse_trajectory

TINY = ModelConfig(width=48, heads=1, blocks=2, rows=4, columns=4)
CHUNKS = 6
PATH = parse_trajectory("w-8,left-15", step_deg=9.0)[None, : CHUNKS * CHUNK_LATENTS]
WALLS = torch.randn(1, 16, PATH.shape[1], 4, 4, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def model(untrained_stream) -> StreamWorld:
    return untrained_stream(TINY)


@pytest.fixture(scope="module")
def text(model):
    return model.text(tokenize("a room at dusk")[None])


@pytest.fixture(scope="module")
def given() -> torch.Tensor:
    return torch.randn(1, 16, 8, 4, 4, generator=torch.Generator().manual_seed(3))


def all_at_once(model, text, latents, w2c=PATH, **noisy):
    level = torch.zeros(1, latents.shape[2])
    return forward_all(model, latents, level, w2c, text, WALLS, **noisy)


def test_both_forms_of_the_cache_give_the_same_rollout(model, text, given):
    grown = stream(model, text, given, PATH, WALLS, seed=1, cache=GrownCache())
    ring = stream(model, text, given, PATH, WALLS, seed=1, cache=RingCache(model, CHUNKS))
    assert torch.allclose(grown, ring, atol=1e-5)


@pytest.mark.parametrize("form", ["grown", "ring"])
def test_two_streams_in_a_batch_are_those_that_go_alone(model, form):
    generator = torch.Generator().manual_seed(5)
    given = torch.randn(2, 16, 8, 4, 4, generator=generator)
    w2c = torch.cat([PATH, PATH.flip(1)])[:, :16]
    text = model.text(torch.stack([tokenize("a room at dusk"), tokenize("a room at night")]))

    def cache(batch: int):
        return GrownCache() if form == "grown" else RingCache(model, 4, batch)

    shared = cache(2)
    both = stream(model, text, given, w2c, seed=1, cache=shared)
    for i in range(2):
        alone, here = cache(1), slice(i, i + 1)
        only = [(k[here], v[here]) for k, v in text]
        stream(model, only, both[here], w2c[here], seed=1, cache=alone)
        for one, two in zip(alone.pairs, shared.pairs, strict=True):
            assert torch.allclose(one[0], two[0][here], atol=1e-5)
            assert torch.allclose(one[1], two[1][here], atol=1e-5)


def test_ring_that_comes_round_keeps_the_latest_chunks(model, text, given):
    ring = stream(model, text, given, PATH, WALLS, seed=1, cache=RingCache(model, 3))
    window = stream(model, text, given, PATH, WALLS, seed=1, cache=GrownCache(2))
    everything = stream(model, text, given, PATH, WALLS, seed=1, cache=GrownCache())
    assert torch.allclose(ring, window, atol=1e-5)
    assert not torch.allclose(ring, everything, atol=1e-3)


def test_ring_is_written_in_place_and_never_grows(model, text, given):
    cache = RingCache(model, 3)
    places = [t.data_ptr() for pair in cache.pairs for t in pair]
    stream(model, text, given, PATH, seed=1, cache=cache)
    assert [t.data_ptr() for pair in cache.pairs for t in pair] == places
    assert cache.written == CHUNKS


def test_refreshes_leave_the_cache_that_one_forward_over_all_chunks_makes(model, text, given):
    grown = GrownCache()
    latents = stream(model, text, given, PATH, WALLS, seed=1, cache=grown)
    _, cache = all_at_once(model, text, latents)
    for kept, made in zip(grown.pairs, cache, strict=True):
        assert torch.allclose(kept[0], made[0], atol=1e-5)
        assert torch.allclose(kept[1], made[1], atol=1e-5)


def test_chunks_in_front_of_a_change_are_kept_as_their_own_prompt_left_them(model, text):
    generator = torch.Generator().manual_seed(6)
    latents = torch.randn(1, 16, 16, 4, 4, generator=generator)
    night, cache, level = model.text(tokenize("a room at night")[None]), None, torch.zeros(1, 4)
    for chunk in range(4):
        here = slice(chunk * CHUNK_LATENTS, (chunk + 1) * CHUNK_LATENTS)
        said = night if chunk < 2 else text
        told = WALLS[:, :, here]
        cache = model(latents[:, :, here], level, PATH[:, here], said, cache, told, refresh=True)
    _, made = all_at_once(model, text, latents, earlier_text=night, changed_at=2)
    _, plain = all_at_once(model, text, latents)
    for kept, changed in zip(cache, made, strict=True):
        assert torch.allclose(kept[0], changed[0], atol=1e-5)
        assert torch.allclose(kept[1], changed[1], atol=1e-5)
    assert not torch.allclose(cache[-1][1][:, :, :128], plain[-1][1][:, :, :128], atol=1e-4)


def test_decoding_equals_the_noisy_chunks_of_one_forward(model, text, given):
    latents = stream(model, text, given, PATH, WALLS, seed=1, cache=GrownCache())
    noisy = torch.randn(1, 16, CHUNK_LATENTS, 4, 4)
    sigma = torch.full((1, CHUNK_LATENTS), 0.7)
    targets = (4, 2)
    at_once, _ = all_at_once(
        model, text, latents[:, :, : 4 * CHUNK_LATENTS], noisy=torch.cat([noisy] * 2, 2),
        sigma=torch.cat([sigma] * 2, 1), targets=targets,
    )  # fmt: skip
    for velocity, chunk in zip(at_once.chunk(2, 2), targets, strict=True):
        start = chunk * CHUNK_LATENTS
        cache = GrownCache()
        stream(
            model, text, latents[:, :, :start], PATH[:, :start], WALLS, seed=1, cache=cache
        )  # fmt: skip
        here = slice(start, start + CHUNK_LATENTS)
        alone = model(noisy, sigma, PATH[:, here], text, cache.pairs, WALLS[:, :, here])
        assert torch.allclose(velocity, alone, atol=1e-5)


def test_keys_of_a_chunk_do_not_depend_on_later_chunks(model, text, given):
    latents = stream(model, text, given, PATH, seed=1, cache=GrownCache())
    _, cache = all_at_once(model, text, latents)
    other, moved = latents.clone(), PATH.clone()
    other[:, :, 12:] += 1.0
    moved[:, 12:, :3, 3] += 1.0
    _, changed = all_at_once(model, text, other, moved)
    before = 12 * TINY.rows * TINY.columns
    for one, two in zip(cache, changed, strict=True):
        assert torch.equal(one[0][:, :, :before], two[0][:, :, :before])
        assert torch.equal(one[1][:, :, :before], two[1][:, :, :before])
        assert not torch.allclose(one[0][:, :, before:], two[0][:, :, before:], atol=1e-3)


def test_where_the_origin_of_the_world_lies_does_not_matter(model, text, given):
    elsewhere = torch.eye(4)
    elsewhere[:3, :3] = parse_trajectory("left-5", step_deg=9.0)[-1, :3, :3]
    elsewhere[:3, 3] = torch.tensor([3.0, -2.0, 5.0])
    a = stream(model, text, given, PATH, seed=1, cache=GrownCache())
    b = stream(model, text, given, PATH @ elsewhere, seed=1, cache=GrownCache())
    assert torch.allclose(a, b, atol=1e-4)


def test_weights_of_the_first_model_fit():
    first = {name: p.shape for name, p in TinyWorld(TINY).state_dict().items()}
    assert {name: p.shape for name, p in StreamWorld(TINY).state_dict().items()} == first


@pytest.mark.parametrize("module", [stream_module, stream_rollout, stream_parallel])
def test_streaming_model_does_not_know_lipass(module):
    source = Path(module.__file__).read_text()
    assert not re.search(r"^\s*(from|import) lipass", source, re.MULTILINE)


@pytest.mark.parametrize("form", ["grown", "ring"])
def test_exact_preset_equals_eager_and_compiles_nothing_after_two_chunks(model, text, given, form):
    def cache():
        return GrownCache() if form == "grown" else RingCache(model, 4)

    torch._dynamo.reset()
    exact = torch.compile(
        model, backend="light_interaction", options={"preset": "exact", "inner": "eager"},
        dynamic=True,
    )  # fmt: skip
    graphs = []

    def call(*args, **options):
        out = exact(*args, **options)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return out

    plain = stream(model, text, given, PATH, WALLS, seed=1, cache=cache())
    made = stream(call, text, given, PATH, WALLS, seed=1, cache=cache())
    assert torch.allclose(made, plain, rtol=1e-4, atol=1e-5)
    # Two given chunks refresh once each; the third is decoded in four steps.
    assert graphs[2:] == [graphs[2]] * len(graphs[2:])


def test_shipped_weights_find_the_way_back_and_not_by_the_latest_chunks_alone():
    shipped, codec = load_stream()
    row, shown, truth = way_back(shipped, codec, seed=9001, chunks=8)
    window, _, _ = way_back(shipped, codec, seed=9001, chunks=8, window_chunks=3)
    assert row["psnr_vs_truth_db"] > 28.0
    assert row["psnr_vs_truth_db"] > window["psnr_vs_truth_db"] + 4.0
    assert row["psnr_vs_truth_db"] == pytest.approx(psnr_db(shown, truth), abs=0.01)
