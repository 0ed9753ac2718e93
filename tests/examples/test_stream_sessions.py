"""Rollouts of the streaming model under sessions: which latents of its cache are read and held."""

import pytest
import torch

from lipass.examples.tinyworld.model import CHUNK_LATENTS, ModelConfig, tokenize
from lipass.examples.tinyworld.stream import StreamWorld
from lipass.examples.tinyworld.stream_compare import (
    Method,
    Run,
    StreamContender,
    Walk,
    compare,
    rows,
)
from lipass.examples.tinyworld.stream_rollout import GrownCache, stream
from lipass.policy.trajectory import parse_trajectory

TINY = ModelConfig(width=48, heads=1, blocks=2, rows=4, columns=4)
LATENT = TINY.rows * TINY.columns
CHUNKS = 10
# Away and back, so that poses have something to choose.
PATH = parse_trajectory("left-20,right-20", step_deg=9.0)[: CHUNKS * CHUNK_LATENTS]
OPTIONS = {
    "preset": "context",
    "hfov_deg": 75.0,
    "vfov_deg": 75.0,
    "context.memory_latents": 3,
    "context.window_chunks_max": 1,
}


class SlicedCache(GrownCache):
    """The reference: the model is given slices of what is stored, as another rollout chose."""

    def __init__(self, contexts, helds):
        super().__init__()
        self.contexts, self.helds = contexts, helds

    def forward(self, model, *args, walls, refresh):
        chunk = self.written // CHUNK_LATENTS
        some = self._slices(self.contexts[chunk])
        made = model(*args, some, walls, refresh=refresh)
        if not refresh:
            return made
        own = [[t[:, :, -CHUNK_LATENTS * LATENT :] for t in pair] for pair in made]
        if self.pairs is not None:
            own = [
                [torch.cat([old, new], 2) for old, new in zip(*pairs, strict=True)]
                for pairs in zip(self.pairs, own, strict=True)
            ]
        self.pairs = own
        self.held += range(self.written, self.written + CHUNK_LATENTS)
        self.written += CHUNK_LATENTS
        self.pairs = self._slices(self.helds[chunk])
        self.held = self.helds[chunk]
        return None

    def _slices(self, latents):
        if not latents:
            return None
        places = [self.held.index(latent) for latent in latents]
        return [
            [t.unflatten(2, (-1, LATENT))[:, :, places].flatten(2, 3) for t in pair]
            for pair in self.pairs
        ]


@pytest.fixture(scope="module")
def model(untrained_stream) -> StreamWorld:
    return untrained_stream(TINY)


@pytest.fixture(scope="module")
def text(model):
    return model.text(tokenize("a room at dusk")[None])


@pytest.fixture(scope="module")
def walk() -> Walk:
    drawn = torch.randn(1, 16, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    return Walk(1, drawn, PATH, torch.zeros(len(PATH) - 8, 3, 32, 32))


def contender(model, limit=None, **options) -> StreamContender:
    return StreamContender(Method("some", {**OPTIONS, **options}, limit), model, "eager")


def latents_of(run):
    return torch.cat([chunk.latents for chunk in run.chunks], 2)


@pytest.mark.parametrize("limit", [None, 6])
def test_latents_that_poses_choose_are_read_as_slices_of_the_cache(
    model, text, walk, limit, fresh_dynamo
):
    run, helds = Run(contender(model, limit), walk, text), []
    for _ in range(CHUNKS):
        run.advance()
        helds.append(list(run.cache.held))
    contexts = [chunk.context for chunk in run.chunks]
    assert max(map(len, contexts)) == 1 + 3 + CHUNK_LATENTS
    assert max(map(len, helds)) == (limit or CHUNKS) * CHUNK_LATENTS
    assert run.cache.pairs[0][0].shape[2] == len(helds[-1]) * LATENT
    expected = stream(
        model, text, walk.given, PATH[None], seed=walk.room, cache=SlicedCache(contexts, helds)
    )
    torch.testing.assert_close(latents_of(run), expected, rtol=1e-4, atol=1e-4)


def test_what_is_given_up_is_not_the_oldest_but_what_others_show(model, text, walk, fresh_dynamo):
    run = Run(contender(model, 6), walk, text)
    run.finish()
    # The way back repeats the way out, whose first views nothing else shows as well.
    assert set(range(CHUNK_LATENTS)) <= set(run.cache.held)
    assert run.cache.held != list(range(len(PATH) - 6 * CHUNK_LATENTS, len(PATH)))


def test_a_cache_that_grows_compiles_nothing_after_warm_up(model, text, walk, fresh_dynamo):
    one = contender(model)
    one.warm_up(walk, text)
    Run(one, walk, text).finish()
    assert one.recompiles == 0


def test_two_rollouts_a_chunk_in_turn_are_those_that_go_alone(model, text, walk, fresh_dynamo):
    shared = contender(model)
    other = Walk(2, walk.given.flip(2), PATH.flip(0), walk.truth)
    alone = []
    for one in (walk, other):
        run = Run(shared, one, text)
        run.finish()
        alone.append(latents_of(run))
    runs = [Run(shared, one, text) for one in (walk, other)]
    for _ in range(CHUNKS):
        for run in runs:
            run.advance()
    for run, expected in zip(runs, alone, strict=True):
        assert torch.equal(latents_of(run), expected)


def test_rows_compare_with_the_dense_rollout(model, text, walk, fresh_dynamo):
    dense = StreamContender(Method("dense", {"preset": "off"}), model, "eager")
    runs = compare([dense, contender(model)], walk, text, lambda _: None)

    class Codec:
        def decode(self, latents):
            shown = latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
            return (0.5 + 0.1 * shown).clamp(0, 1)  # of pictures

    first, second = rows(runs, Codec())
    assert first["kv_tokens"] == (len(PATH) - CHUNK_LATENTS) * LATENT
    assert second["kv_tokens"] == 8 * LATENT
    assert (first["psnr_vs_dense_db"], first["speedup_vs_dense"]) == (None, None)
    assert second["psnr_vs_dense_db"] < 90
    assert rows(runs[1:], Codec())[0]["psnr_vs_dense_db"] is None


def test_no_session_leaves_the_rollout_to_the_model(model, text, walk, fresh_dynamo):
    run = Run(StreamContender(Method("dense", {"preset": "off"}), model, "eager"), walk, text)
    run.finish()
    assert run.session is None
    expected = stream(model, text, walk.given, PATH[None], seed=1, cache=GrownCache())
    torch.testing.assert_close(latents_of(run), expected, rtol=1e-4, atol=1e-4)
