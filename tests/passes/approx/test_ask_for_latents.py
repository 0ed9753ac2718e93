"""A decode graph without cameras asks the session which latents of its history it reads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipass

LATENT, NEW = 24, 2 * 24


class Decode(nn.Module):
    """Write to a preallocated cache at an index and read a window of it, as released code does."""

    def __init__(self, window=480):
        super().__init__()
        self.embed, self.qkv, self.window = nn.Linear(8, 64), nn.Linear(64, 192), window

    def forward(self, x, keys, values, start):
        h = self.embed(x.flatten(2).transpose(1, 2))
        end = start + h.shape[1]
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 32)).unbind(2)
        keys[:, start:end], values[:, start:end] = k, v
        first = max(0, end - self.window)
        q, k, v = (x.transpose(1, 2) for x in (q, keys[:, first:end], values[:, first:end]))
        return F.scaled_dot_product_attention(q, k, v)


def _rollout(model, session=None, chunks=6, held=None, history=None):
    keys, values = torch.zeros(2, 1, 1000, 2, 32)
    torch.manual_seed(1)
    outs, seen = [], []
    for i in range(chunks):
        x = torch.randn(1, 8, 2, 4, 6)
        call = (x, keys, values, i * NEW)
        if session is None:
            outs.append(model(*call))
            continue
        latents = torch.zeros(2 * i, 8) if history is None else history[: 2 * i]
        with session.chunk(latents=latents, held=held and held(i)) as chunk:
            outs.append(model(*call))
            seen.append(chunk)
    return outs, seen


def _reference(model, contexts, chunks=6):
    """Compute what attention to the chosen latents alone gives."""
    keys, values = torch.zeros(2, 1, 1000, 2, 32)
    torch.manual_seed(1)
    outs = []
    for i in range(chunks):
        x = torch.randn(1, 8, 2, 4, 6)
        h = model.embed(x.flatten(2).transpose(1, 2))
        q, k, v = model.qkv(h).unflatten(-1, (3, 2, 32)).unbind(2)
        keys[:, i * NEW : (i + 1) * NEW], values[:, i * NEW : (i + 1) * NEW] = k, v
        kept = [*contexts[i], 2 * i, 2 * i + 1]
        tokens = torch.cat([torch.arange(n * LATENT, (n + 1) * LATENT) for n in kept])
        q, k, v = (x.transpose(1, 2) for x in (q, keys[:, tokens], values[:, tokens]))
        outs.append(F.scaled_dot_product_attention(q, k, v))
    return outs


_OPTIONS = {
    "context.chunk_latents": 2,
    "context.window_chunks_max": 2,
    "context.window_chunks_min": 1,
    "context.sink_latents": 1,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Decode().eval().requires_grad_(False)


def _compiled(model, **options):
    return torch.compile(
        model,
        backend="light_interaction",
        options={"preset": "context", "inner": "eager", **_OPTIONS, **options},
    )


def test_only_chosen_latents_of_a_cache_are_read(model, fresh_dynamo):
    with lipass.Session(preset="context", **_OPTIONS) as session:
        outs, chunks = _rollout(_compiled(model), session)
    contexts = [chunk.context for chunk in chunks]
    assert contexts[5] == [0, 6, 7, 8, 9]
    for got, expected in zip(outs, _reference(model, contexts), strict=True):
        torch.testing.assert_close(got, expected)
    assert [chunk.latents_read for chunk in chunks[3:]] == [5, 5, 5]


class Block(nn.Module):
    """Attend from tokens to those of a cache and their own, and return them behind it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, h, cache):
        q, *new = self.qkv(h).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        grown = [torch.cat(pair, 2) for pair in zip(cache, new, strict=True)]
        out = F.scaled_dot_product_attention(q, *grown).transpose(1, 2).flatten(2)
        return h + self.out(out), grown


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, caches):
        h, grown = self.embed(x.flatten(2).transpose(1, 2)), []
        for block, cache in zip(self.blocks, caches, strict=True):
            h, one = block(h, cache)
            grown.append(one)
        return h, grown


def test_latents_that_layers_ask_for_in_one_body_are_chosen(fresh_dynamo):
    torch.manual_seed(0)
    fast = _compiled(Blocks().eval().requires_grad_(False))
    caches = [[torch.zeros(1, 2, 0, 32) for _ in range(2)] for _ in range(2)]
    with lipass.Session(preset="context", **_OPTIONS) as session:
        for i in range(6):
            with session.chunk(latents=torch.zeros(2 * i, 8)) as chunk:
                _, caches = fast(torch.randn(1, 8, 2, 4, 6), caches)
    assert (len(chunk.context), chunk.latents_read) == (5, 5)


def test_fast_latents_shorten_the_window(model, fresh_dynamo):
    with lipass.Session(preset="context", **_OPTIONS) as session:
        _, chunks = _rollout(_compiled(model), session, history=torch.arange(-3, 3, 0.5)[:, None])
    assert chunks[5].context == [0, 8, 9]


class WithCameras(nn.Module):
    """Take the cameras of the new latents alone, by which no graph can choose a history."""

    def __init__(self):
        super().__init__()
        self.inner, self.camera = Decode(), nn.Linear(16, 8)

    def forward(self, x, keys, values, start, w2c):
        x = x + self.camera(w2c.flatten(2)).transpose(1, 2)[..., None, None]
        return self.inner(x, keys, values, start)


def test_cameras_of_the_new_latents_alone_choose_nothing(fresh_dynamo):
    torch.manual_seed(0)
    model = WithCameras().eval().requires_grad_(False)
    fast, w2c = _compiled(model), torch.eye(4).repeat(1, 2, 1, 1)
    with lipass.Session(preset="context", **_OPTIONS) as session:
        _, chunks = _rollout(lambda *call: fast(*call, w2c), session)
    assert chunks[5].context == [0, 6, 7, 8, 9]
    assert [chunk.latents_read for chunk in chunks[3:]] == [5, 5, 5]


def test_without_a_session_all_is_read(model, fresh_dynamo):
    outs, _ = _rollout(_compiled(model))
    for got, expected in zip(outs, _rollout(model)[0], strict=True):
        torch.testing.assert_close(got, expected)


def test_what_a_window_has_lost_is_not_chosen(model, fresh_dynamo):
    model.window = 4 * LATENT  # two latents of history behind the new ones

    def held(i):
        return range(max(0, 2 * i - 2), 2 * i)

    with lipass.Session(preset="context", **_OPTIONS) as session:
        outs, chunks = _rollout(_compiled(model), session, held=held)
    assert chunks[5].context == [8, 9]
    for got, expected in zip(outs, _rollout(model)[0], strict=True):
        torch.testing.assert_close(got, expected)


def test_a_graph_that_reads_other_latents_than_are_held_says_so(model, fresh_dynamo):
    with (
        lipass.Session(preset="context", **_OPTIONS) as session,
        pytest.warns(lipass.LipassWarning, match="must read the history latents"),
    ):
        _rollout(_compiled(model), session, held=lambda i: range(min(2 * i, 7)))


def test_the_released_gates_need_cameras():
    with (
        lipass.Session(preset="reference") as session,
        pytest.raises(ValueError, match="chooses by cameras, got none; pass query"),
    ):
        session.chunk(latents=torch.zeros(4, 8))


def test_no_step_is_reused_without_cameras_unless_always():
    for options, allowed in (({}, False), ({"steps.overlap_min": 0.0}, True)):
        with lipass.Session(preset="cache", **options) as session:
            assert session.chunk(latents=torch.zeros(4, 8)).plan.revisit.allowed is allowed
