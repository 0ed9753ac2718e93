"""Keys of a cache stay as and where they were written; a session chooses what is read."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipass
from lipass.adapters.checkouts.poses import there_and_back

NEW, LATENT, ROOM, CHUNKS = 2, 24, 8, 7
OPTIONS = {
    "context.chunk_latents": NEW,
    "context.window_chunks_max": 1,
    "context.window_chunks_min": 1,
    "context.sink_latents": 0,
    "context.memory_latents": 2,
}


def turned(x, first):
    """Turn tokens `[B, T * YX, H, D]` by the latent of the rollout that they are of."""
    x = x.unflatten(1, (-1, LATENT))
    place = torch.arange(x.shape[1], dtype=x.dtype) + first
    angle = place[:, None] * 0.7 ** torch.arange(x.shape[-1] // 2)
    cos, sin = (one[:, None, None] for one in (angle.cos(), angle.sin()))
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).flatten(1, 2)


class Streaming(nn.Module):
    """Project a chunk, turn its queries and keys by their time, and attend from a cache too."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv = nn.Linear(8, 64), nn.Linear(64, 192)

    def project(self, x, first):
        h = self.embed(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 32)).unbind(2)
        return (one.transpose(1, 2) for one in (turned(q, first), turned(k, first), v))

    def forward(self, x, first, cache, *places):
        q, k, v = self.project(x, first)
        return self.attend(q, (k, v), cache, *places)


class Grown(Streaming):
    """Return the cache with the chunk behind it."""

    def attend(self, q, new, cache):
        cache = [torch.cat(pair, 2) for pair in zip(cache, new, strict=True)]
        return F.scaled_dot_product_attention(q, *cache), cache


class GrownInFront(Streaming):
    """Return the cache with the chunk in front of it."""

    def attend(self, q, new, cache):
        cache = [torch.cat(pair, 2) for pair in zip(new, cache, strict=True)]
        return F.scaled_dot_product_attention(q, *cache), cache


class Ring(Streaming):
    """Write a chunk in place of the oldest, and read all that is there."""

    def attend(self, q, new, cache, slot, filled):
        for stored, one in zip(cache, new, strict=True):
            stored[:, :, slot : slot + one.shape[2]] = one
        return F.scaled_dot_product_attention(q, *(one[:, :, :filled] for one in cache)), cache


class RingOfParts(Streaming):
    """The same, with what is beside the slot joined by the model itself."""

    def attend(self, q, new, cache, slot, filled):
        behind, keys = slot + new[0].shape[2], []
        for stored, one in zip(cache, new, strict=True):
            stored[:, :, slot:behind] = one
            keys.append(torch.cat([stored[:, :, :slot], stored[:, :, behind:filled], one], 2))
        return F.scaled_dot_product_attention(q, *keys), cache


class RingScattered(Streaming):
    """The same in a copy of the cache."""

    def attend(self, q, new, cache, slot, filled):
        behind = slot + new[0].shape[2]
        cache = [
            torch.slice_scatter(stored, one, 2, slot, behind)
            for stored, one in zip(cache, new, strict=True)
        ]
        return F.scaled_dot_product_attention(q, *(one[:, :, :filled] for one in cache)), cache


class Rolled(Streaming):
    """Move what is there to the front, and write the chunk to the end."""

    def attend(self, q, new, cache, slot, filled):
        tokens, room = new[0].shape[2], cache[0].shape[2]
        for stored, one in zip(cache, new, strict=True):
            if slot + tokens > room:
                stored[:, :, :-tokens] = stored[:, :, tokens:].clone()
            at = min(slot, room - tokens)
            stored[:, :, at : at + tokens] = one
        return F.scaled_dot_product_attention(q, *(one[:, :, :filled] for one in cache)), cache


class RingFilmed(Ring):
    """Take the cameras of all latents that are read, oldest first, as the graph shows."""

    def __init__(self):
        super().__init__()
        self.camera = nn.Linear(16, 8)

    def filmed(self, x, w2c):
        return x + self.camera(w2c[:, -NEW:].flatten(2)).transpose(1, 2)[..., None, None]

    def forward(self, x, first, cache, slot, filled, w2c):
        return super().forward(self.filmed(x, w2c), first, cache, slot, filled)


RINGS = (Ring, RingOfParts, RingScattered, RingFilmed)
_SLOW = (RingOfParts, RingScattered)
RINGS_GIVEN_NO_CAMERAS = [
    pytest.param(kind, marks=pytest.mark.slow if kind in _SLOW else ()) for kind in RINGS[:3]
]


def slots(chunk):
    """Latents that a ring holds beside the slot of a chunk, in the order of the slots."""
    room = ROOM // NEW
    chunks = sorted(range(max(0, chunk + 1 - room), chunk), key=lambda one: one % room)
    return [one * NEW + i for one in chunks for i in range(NEW)]


def latest(chunk):
    return list(range(max(0, (chunk + 1) * NEW - ROOM), chunk * NEW))


def newest_first(chunk):
    return [one * NEW + i for one in reversed(range(chunk)) for i in range(NEW)]


def places(kind, chunk):
    """Where a call of a model writes, and how far it reads, in tokens."""
    if kind in (Grown, GrownInFront):
        return ()
    at = chunk % (ROOM // NEW) if kind in RINGS else chunk
    return at * NEW * LATENT, min((chunk + 1) * NEW, ROOM) * LATENT


def rolled_out(kind, session, held):
    """Return what each chunk attends to and what attention to its context alone would give."""
    torch.manual_seed(0)
    model = kind().eval().requires_grad_(False)
    options = {"preset": "context", "inner": "eager", **OPTIONS}
    fast = torch.compile(model, backend="light_interaction", options=options)
    grown = kind in (Grown, GrownInFront)
    cache = [torch.zeros(1, 2, 0 if grown else ROOM * LATENT, 32) for _ in range(2)]
    all_keys, all_values, rows = [], [], []
    w2c = there_and_back(CHUNKS, NEW)
    for chunk in range(CHUNKS):
        x, first = torch.randn(1, 8, NEW, 4, 6), chunk * NEW
        seen = w2c[None, [*latest(chunk), *range(first, first + NEW)]]
        own = model.filmed(x, seen) if kind is RingFilmed else x
        q, k, v = model.project(own, torch.tensor(float(first)))
        all_keys += k.split(LATENT, 2)
        all_values += v.split(LATENT, 2)
        given = {"poses": w2c[:first] if first else None, "query": w2c[first : first + NEW]}
        with session.chunk(**given, held=held and held(chunk)) as made:
            call = (x, torch.tensor(float(first)), cache, *places(kind, chunk))
            out, cache = fast(*call, seen) if kind is RingFilmed else fast(*call)
        kept = [*made.context, *range(first, first + NEW)]
        alone = (torch.cat([one[i] for i in kept], 2) for one in (all_keys, all_values))
        rows.append((made, out, F.scaled_dot_product_attention(q, *alone)))
    return rows


def assert_only_chosen(rows):
    for _, out, expected in rows:
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert [made.latents_read for made, _, _ in rows] == [
        None, *(len(made.context) for made, _, _ in rows[1:])
    ]  # fmt: skip
    assert any(len(made.context) < len(made.held) for made, _, _ in rows)


@pytest.fixture
def session():
    with lipass.Session(preset="context", **OPTIONS) as session:
        yield session


HELD = {Grown: None, GrownInFront: newest_first, Rolled: latest}


@pytest.mark.parametrize("kind", [*HELD, *RINGS_GIVEN_NO_CAMERAS])
def test_chosen_keys_keep_the_time_at_which_they_were_written(kind, session, fresh_dynamo):
    assert_only_chosen(rolled_out(kind, session, HELD.get(kind, slots)))
    assert lipass.report().graphs <= 4


@pytest.mark.parametrize("kind", RINGS_GIVEN_NO_CAMERAS)
@pytest.mark.filterwarnings("ignore:an approximate session")
def test_ring_whose_latents_are_told_in_the_order_of_time_is_refused(kind, session, fresh_dynamo):
    with pytest.warns(lipass.LipassWarning, match="held must follow the slots of the cache"):
        rows = rolled_out(kind, session, latest)
    for chunk, (made, _, _) in enumerate(rows):
        if slots(chunk) != latest(chunk):
            assert made.latents_read == len(made.held), chunk


def test_ring_of_which_nothing_is_told_is_read_whole(session, fresh_dynamo):
    with pytest.warns(lipass.LipassWarning, match="pass as `held` those that the cache holds"):
        rows = rolled_out(Ring, session, None)
    assert rows[-1][0].latents_read == ROOM - NEW


@pytest.mark.filterwarnings("ignore:an approximate session")
def test_cache_that_grows_in_front_needs_its_order(session, fresh_dynamo):
    with pytest.warns(lipass.LipassWarning, match="must know which latent each place"):
        rows = rolled_out(GrownInFront, session, None)
    assert rows[-1][0].latents_read == (CHUNKS - 1) * NEW


def test_cameras_in_the_order_of_time_do_not_choose_slots(session, fresh_dynamo):
    assert_only_chosen(rolled_out(RingFilmed, session, slots))
    notes = [note for one in lipass.report().passes for note in one.notes]
    assert any("the cameras of the graph do not choose: its cache goes on" in one for one in notes)
