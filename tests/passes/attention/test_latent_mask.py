"""Masks that say which latents see which restrict what is chosen; others stay, with the reason."""

import pytest
import torch
from attending import describe, heads, kv, latents
from torch.nn import functional as F

import lipass
from lipass.kernels import registry
from lipass.passes.attention.site import sites
from lipass.passes.attention.sparse_call import SparseCall

TEXT = "canonicalize,find-attention,sparse-attention"
PLACES = 16


def frames_of(x):
    return torch.arange(x.shape[2], device=x.device)


def causal_by_repeats(x):
    """As released models with blocks of frames make it."""
    frame = frames_of(x)
    shown = frame[None] <= frame[:, None]
    t, y, w = x.shape[2:]
    shown = shown.view(t, 1, 1, t, 1, 1).repeat(1, y, w, 1, y, w)
    return shown.reshape(t * y * w, t * y * w)[None, None]


def causal_by_division(x):
    frame = torch.arange(x.shape[2] * PLACES) // PLACES
    return frame[:, None] >= frame


def causal_of_chunks(x):
    chunk = frames_of(x).div(2, rounding_mode="floor").repeat_interleave(PLACES)
    return (chunk[:, None] >= chunk)[None, None]


def sliding_window(x):
    frame = torch.arange(x.shape[2]).repeat_interleave(PLACES)
    return (frame[:, None] - frame).abs() < 2


def sink_and_window(x):
    at = torch.arange(x.shape[2] * PLACES)
    frame = at // PLACES
    near = frame[:, None] - frame
    return ((near >= 0) & (near < 2)) | (at < PLACES)


def additive(x):
    return torch.where(causal_by_division(x), 0.0, float("-inf"))


def filled(x):
    shown = causal_by_division(x)
    return torch.zeros(shown.shape).masked_fill(~shown, float("-inf"))[None, None]


def filled_in_place(x):
    shown = causal_by_division(x)
    mask = torch.zeros(shown.shape)
    mask.masked_fill_(~shown, float("-inf"))
    return mask[None, None]


def filled_where_it_is(x):
    shown = causal_by_division(x)
    mask = torch.zeros(shown.shape)
    mask.masked_fill_(~shown, float("-inf"))
    return mask


def looked_up(x):
    """By a table of frames, as functions for FlexAttention are written."""
    table = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
    frame = torch.arange(x.shape[2] * PLACES) // PLACES
    return table[frame[:, None], frame[None]]


def joined_frames(x):
    frame = torch.cat([torch.full((2 * PLACES,), 0), torch.full(((x.shape[2] - 2) * PLACES,), 1)])
    return frame[:, None] >= frame


PROVEN = [
    causal_by_repeats, causal_by_division, causal_of_chunks, sliding_window, sink_and_window,
    additive, filled, filled_in_place,
    filled_where_it_is, looked_up, joined_frames,
]  # fmt: skip


class Attend(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        mask = self.mask(x)
        tokens = x.flatten(2).mT
        for _ in range(2):
            q = heads(tokens)
            out = F.scaled_dot_product_attention(q, q * 0.5, q * 3, attn_mask=mask)
            tokens = tokens + out.transpose(1, 2).flatten(2) * 0.1
        return tokens


@pytest.mark.parametrize("mask", PROVEN, ids=lambda one: one.__name__)
def test_a_mask_over_latents_is_found(trace, apply, mask):
    gm = trace(Attend(mask), (latents(),))
    apply(gm, TEXT)
    first, second = SparseCall.nodes(gm.graph)
    calls = [SparseCall.of(node) for node in (first, second)]
    assert calls[0].latent_mask is not None
    assert calls[0].latent_mask is calls[1].latent_mask
    assert calls[0].tile == (1, 8, 8)
    x = latents()
    with registry.force("sparse"):
        torch.testing.assert_close(gm(x)[0], Attend(mask)(x))


@pytest.mark.parametrize("mask", [causal_by_repeats, causal_of_chunks, sink_and_window])
def test_it_holds_for_any_number_of_latents(trace, apply, mask):
    gm = trace(Attend(mask), (latents(4),), (latents(6),))
    apply(gm, TEXT)
    assert "and a mask says which latents see which" in describe(gm)
    assert len(SparseCall.nodes(gm.graph)) == 2


def causal_by_token(x):
    return torch.ones(x.shape[2] * PLACES, x.shape[2] * PLACES, dtype=torch.bool).tril()


def by_rows_of_a_latent(x):
    at = torch.arange(x.shape[2] * PLACES) // 8
    return at[:, None] >= at


def offset_within_a_latent(x):
    at = (torch.arange(x.shape[2] * PLACES) + 8) // PLACES
    return at[:, None] >= at


def of_the_latents(x):
    score = x.mean((0, 1)).flatten()
    return score[:, None] < score + 1


def biased(x):
    return torch.where(causal_by_division(x), 0.5, float("-inf"))


def nearly_hidden(x):
    return torch.where(causal_by_division(x), 0.0, -1e9)


def written_in_parts(x):
    mask = causal_by_division(x)
    mask[:, :3] = True
    return mask


def rows_written_in_parts(x):
    places = x.shape[2] * PLACES
    mask = (torch.arange(places) < places - 8)[None, None, None].repeat(1, 1, places, 1)
    mask[:, :, :24, 24:] = False
    return mask


def of_each_head(x):
    frame = torch.arange(x.shape[2] * PLACES) // PLACES
    return frame[:, None] - frame >= -torch.arange(2)[:, None, None]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (causal_by_token, "nothing shows that it is one for all queries of a latent"),
        (by_rows_of_a_latent, "nothing shows that it is one for all queries of a latent"),
        (offset_within_a_latent, "nothing shows that it is one for all queries of a latent"),
        (of_the_latents, "nothing shows that it is one for all queries of a latent"),
        (rows_written_in_parts, "nothing shows that it is one for all queries of a latent"),
        (written_in_parts, "nothing shows that it is one for all queries of a latent"),
        (of_each_head, "may differ between heads"),
        (biased, "adds to its scores other numbers than 0 and -inf"),
        (nearly_hidden, "adds to its scores other numbers than 0 and -inf"),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_other_masks_stay(trace, apply, mask, reason):
    gm = trace(Attend(mask), (latents(),))
    _, ctx = apply(gm, TEXT)
    assert not SparseCall.nodes(gm.graph)
    assert all(site.role == "other" and reason in site.reason for _, site in sites(gm.graph))
    kept = [note.reason for note in ctx.notes if note.action == "kept"]
    assert len(kept) == 2
    assert reason in kept[0]


def test_a_mask_that_changes_between_layers_stays(trace, apply):
    class Opened(Attend):
        def forward(self, x):
            mask = torch.zeros(4 * PLACES, 4 * PLACES)
            mask.masked_fill_(~causal_by_division(x), float("-inf"))
            q = heads(x.flatten(2).mT)
            first = F.scaled_dot_product_attention(q, q * 0.5, q * 3, attn_mask=mask)
            mask.fill_(0.0)
            return first + F.scaled_dot_product_attention(q, q * 0.5, q * 3, attn_mask=mask)

    gm = trace(Opened(None), (latents(),))
    apply(gm, TEXT)
    assert "is written to behind it" in describe(gm)
    x = latents()
    with registry.force("sparse"):
        torch.testing.assert_close(gm(x)[0], Opened(None)(x))


def test_a_mask_that_is_given_is_data(trace, apply):
    def fn(x, mask):
        q = heads(x.flatten(2).mT)
        return F.scaled_dot_product_attention(q, q * 2, q * 3, attn_mask=mask)

    gm = trace(fn, (latents(), causal_by_token(latents())))
    apply(gm, TEXT)
    assert "nothing shows that it is one for all queries of a latent" in describe(gm)


def test_a_mask_of_frames_that_is_given_and_spread_is_known(trace, apply):
    def fn(x, frames):
        q = heads(x.flatten(2).mT)
        mask = frames.repeat_interleave(PLACES, 0).repeat_interleave(PLACES, 1)
        return F.scaled_dot_product_attention(q, q * 2, q * 3, attn_mask=mask)

    inputs = (latents(), torch.rand(4, 4) < 0.7)
    gm = trace(fn, inputs)
    apply(gm, TEXT)
    assert len(SparseCall.nodes(gm.graph)) == 1
    with registry.force("sparse"):
        torch.testing.assert_close(gm(*inputs)[0], fn(*inputs))


def test_a_history_may_be_masked_too(trace, apply):
    """A window over the latents of a cache in front of the new ones."""

    def fn(x, past):
        q = heads(x.flatten(2).mT)
        key, value = torch.cat([past, q * 2], 2), torch.cat([past + 1, q * 3], 2)
        frame = torch.arange(key.shape[2]) // PLACES
        rows = torch.arange(q.shape[2]) // PLACES + past.shape[2] // PLACES
        near = rows[:, None] - frame
        mask = (near >= 0) & (near < 4)
        return F.scaled_dot_product_attention(q, key, value, attn_mask=mask), key

    inputs = [(latents(), torch.randn(1, 2, n * PLACES, 8)) for n in (5, 7)]
    gm = trace(fn, *inputs)
    apply(gm, TEXT)
    (call,) = map(SparseCall.of, SparseCall.nodes(gm.graph))
    assert (call.role, call.latent_mask is not None) == ("decode", True)


def with_text(spread):
    """Attend to a prompt in front of latents that see those before them."""

    def fn(x, text):
        q = heads(x.flatten(2).mT)
        key, value = torch.cat([text, q * 0.5], 2), torch.cat([text + 1, q * 3], 2)
        mask = spread(causal_by_division(x), text.shape[2])
        return F.scaled_dot_product_attention(q, key, value, attn_mask=mask)

    return fn


def by_ones(shown, text):
    return torch.cat([torch.ones(shown.shape[0], text, dtype=torch.bool), shown], 1)[None, None]


def by_padding(shown, text):
    return F.pad(shown, (text, 0), value=True)


def by_zeros(shown, text):
    added = torch.where(shown, 0.0, float("-inf"))
    return torch.cat([torch.zeros(shown.shape[0], text), added], -1)


@pytest.mark.parametrize("spread", [by_ones, by_padding, by_zeros])
def test_text_in_front_that_all_see(trace, apply, spread):
    fn, inputs = with_text(spread), (latents(), kv(6))
    gm = trace(fn, inputs)
    apply(gm, TEXT)
    (call,) = map(SparseCall.of, SparseCall.nodes(gm.graph))
    assert call.roles == ("text", "current")
    with registry.force("sparse"):
        torch.testing.assert_close(gm(*inputs)[0], fn(*inputs))


def hidden_later(shown, text):
    mask = by_ones(shown, text)
    mask[:, :, :, :2] = False
    return mask


def padded_and_hidden_later(shown, text):
    mask = by_padding(shown, text)
    mask.narrow(1, 0, 2).fill_(False)
    return mask.clone()


def turned_and_hidden_later(shown, text):
    mask = torch.logical_not(F.pad(~shown, (text, 0)))
    mask[:, :2] = False
    return mask


@pytest.mark.parametrize(
    "spread",
    [
        lambda shown, text: F.pad(shown, (text, 0)),
        lambda shown, text: F.pad(shown, (0, text), value=True),
        lambda shown, text: torch.cat([shown[:, :text], shown], 1),
        hidden_later,
        padded_and_hidden_later,
        turned_and_hidden_later,
    ],
    ids=["hidden", "behind", "of latents", "written", "padded, written", "turned, written"],
)
def test_text_that_not_all_see_stays(trace, apply, spread):
    gm = trace(with_text(spread), (latents(), kv(6)))
    apply(gm, TEXT)
    assert "covers text too, and nothing shows that every query sees it" in describe(gm)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_models_visit_what_the_mask_shows():
    torch.manual_seed(0)
    registry.reset_telemetry()
    model, x = Attend(causal_by_repeats), latents(6)
    options = {"preset": "sparse", "sparse.budget": 1.0, "inner": "eager"}
    with torch.no_grad(), registry.force("sparse"):
        fast = torch.compile(model, backend="light_interaction", options=options)
        torch.testing.assert_close(fast(x), model(x))
    assert "2 rewritten, 0 kept" in lipass.report().table()
    densities = [counts.density for counts in registry.telemetry().values()]
    assert densities == pytest.approx([21 / 36] * 2)
