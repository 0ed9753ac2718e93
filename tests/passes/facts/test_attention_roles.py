"""What keys are to the queries: text, history, their own, or of another source."""

import pytest
import torch
from attending import HISTORY, TEXT, attend, heads, kv, latents
from torch.nn import functional as F

from lipass.passes.attention import token_grid
from lipass.passes.attention.site import sites


def test_query_without_a_grid(found):
    def fn(x, text, history):
        q = heads(x)
        key = torch.cat([text, history, q], 2)
        return F.scaled_dot_product_attention(q, key, key)

    args = (torch.randn(1, 64, 16), kv(6), kv(128))
    reason = token_grid.NO_RESHAPE
    assert found(fn, args) == [("other", reason)]


def test_token_grid_option_gives_what_the_graph_does_not_show(found):
    def fn(x, text, history, w2c):
        q = heads(x)
        key = torch.cat([text, history, q], 2)
        return F.scaled_dot_product_attention(q, key, key) * w2c.sum()

    args = (torch.randn(1, 64, 16), kv(6), kv(128), torch.randn(1, 12, 4, 4))
    text = "canonicalize,find-attention{token_grid=4x4}"
    assert found(fn, args, text=text) == [("decode", "it has history keys")]


def test_token_grid_option_that_does_not_fit(found, grown):
    text = "canonicalize,find-attention{token_grid=5x5}"
    reason = "token_grid (5, 5) does not give the 64 tokens of q"
    assert found(attend, *grown, text=text) == [("other", reason)]


def test_text_of_whole_latents_and_fixed_length_is_not_guessed(found):
    args = (latents(), kv(32), kv(16 * HISTORY))
    ((role, reason),) = found(attend, args)
    assert role == "other"
    assert reason.startswith("key piece 0 of 32: it could be text or 2 latents; name the pieces")


def test_two_pieces_of_whole_latents_that_vary_are_not_guessed(found):
    args, grown = ((latents(), kv(16 * n), kv(32 * n)) for n in (2, 4))
    ((role, reason),) = found(attend, args, grown)
    assert role == "other"
    assert reason.startswith("keys are history | history | current; name the pieces")


def test_cameras_tell_history_from_text_of_whole_latents(found):
    def fn(x, text, history, w2c):
        return attend(x, text, history) * w2c.sum()

    args, grown = (
        (latents(), kv(16 * n), kv(32 * n), torch.randn(1, 2 * n + 4, 4, 4)) for n in (2, 4)
    )
    assert found(fn, args, grown) == [("decode", "it has history keys")]


def test_segments_option_names_the_pieces(found):
    args = (latents(), kv(32), kv(16 * HISTORY))
    text = "canonicalize,find-attention{segments=text+history+current}"
    assert found(attend, args, text=text) == [("decode", "it has history keys")]


def test_segments_option_leaves_out_history_in_prefill(trace, apply, mini, inputs):
    gm = trace(mini, inputs(4).prefill)
    apply(gm, "canonicalize,find-attention{segments=text+history+current}")
    assert [site.role for _, site in sites(gm.graph)] == ["prefill"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("history+text+current", "key piece 0 of 6: history must be whole latents of 16 tokens"),
        ("text+current", "segments names 2 pieces, the keys have 3"),
        (
            "text+history+history",
            "key piece 2 of 64: it is made from the tokens of q, but segments calls it history",
        ),
        (
            "text+current+current",
            "key piece 1 of 128: "
            "segments calls it current, but it is not made from the tokens of q",
        ),
    ],
)
def test_segments_option_that_contradicts_the_graph(found, names, reason):
    args = (latents(), kv(6), kv(16 * HISTORY))
    text = f"canonicalize,find-attention{{segments={names}}}"
    assert found(attend, args, text=text) == [("other", reason)]


def test_keys_of_q_must_be_there_once(found, grown):
    def fn(x, text, history):
        q = heads(x.flatten(2).mT)
        key = torch.cat([text, q, history, q * 2], 2)
        return F.scaled_dot_product_attention(q, key, key)

    reason = "keys are text | current | history | current; those of q must be there once"
    assert found(fn, *grown) == [("other", reason)]


def test_cross_attention(found):
    def fn(x, text):
        return F.scaled_dot_product_attention(heads(x.flatten(2).mT), text, text)

    assert found(fn, (latents(), kv(6))) == [("cross", "no key is made from the tokens of q")]


def test_cross_attention_to_as_many_keys_as_queries(found):
    def fn(x, text):
        return F.scaled_dot_product_attention(heads(x.flatten(2).mT), text, text)

    assert found(fn, (latents(), kv(64))) == [("cross", "no key is made from the tokens of q")]


def test_text_self_attention(found):
    def fn(words):
        q = heads(words + 1)
        return F.scaled_dot_product_attention(q, q, q)

    ((role, _),) = found(fn, (torch.randn(1, 6, 16),))
    assert role == "text"


def test_self_attention_without_history_is_a_role_of_its_own(found):
    reason = "its tokens attend to each other, without a history"
    assert found(attend, (latents(), kv(6))) == [("self", reason)]


@pytest.mark.parametrize("parts", ["k", "kv", "v"])
def test_tokens_put_in_their_places_part_by_part_are_joined_again(found, parts):
    """As where memory and what is new have positions of their own."""

    def fn(x, memory, new):
        def placed(tokens):
            return torch.cat([tokens[:, :, :16] * memory, tokens[:, :, 16:] * new], 2)

        tokens = x.flatten(2).mT
        q, v = heads(tokens), heads(tokens * 3)
        k = placed(q) if parts != "v" else q * 2
        return F.scaled_dot_product_attention(placed(q), k, placed(v) if "v" in parts else v)

    reason = "its tokens attend to each other, without a history"
    assert found(fn, (latents(), torch.rand(8), torch.rand(8))) == [("self", reason)]


def test_keys_of_which_a_part_is_of_others_are_not_joined_again(found):
    def fn(x, other):
        q = heads(x.flatten(2).mT)
        key = torch.cat([heads(other.flatten(2).mT), q[:, :, 16:]], 2)
        return F.scaled_dot_product_attention(q, key, key)

    ((role, _),) = found(fn, (latents(), latents(1)))
    assert role == "other"


def test_keys_made_from_other_latents_of_the_same_size_are_not_current(found):
    def fn(x, other):
        key = heads(other.flatten(2).mT)
        return F.scaled_dot_product_attention(heads(x.flatten(2).mT), key, key)

    assert found(fn, (latents(), latents())) == [("cross", "no key is made from the tokens of q")]


def test_prompt_of_a_length_that_varies_is_text(found):
    def fn(x, words):
        return attend(x, heads((words + 1) @ words.new_ones(16, 16)))

    args, grown = ((latents(), torch.randn(1, n, 16)) for n in (32, 64))
    reason = "its tokens attend to each other, without a history"
    assert found(fn, args, grown) == [("self", reason)]


def test_prompt_that_varies_with_the_history(trace, apply):
    def fn(x, words, history):
        return attend(x, heads(words @ words.new_ones(16, 16)), history)

    args, grown = ((latents(), torch.randn(1, n, 16), kv(n * 2)) for n in (32, 64))
    gm = trace(fn, args, grown)
    apply(gm, TEXT)
    ((_, site),) = sites(gm.graph)
    assert [segment.role for segment in site.segments] == ["text", "history", "current"]
    assert site.segments[0].why == "%matmul makes it, and from no latents"


def test_prompt_with_as_many_tokens_as_there_are_cameras(trace, apply):
    def fn(x, words, history, w2c):
        return attend(x, heads(words @ words.new_ones(16, 16)), history) * w2c.sum()

    args = (latents(), torch.randn(1, 32, 16), kv(32), torch.randn(1, 6, 4, 4))
    gm = trace(fn, args)
    apply(gm, TEXT)
    ((_, site),) = sites(gm.graph)
    assert [segment.role for segment in site.segments] == ["text", "history", "current"]


def test_latents_that_the_graph_projects_are_history(found):
    def fn(x, memory, w2c):
        return attend(x, heads((memory * 2).flatten(2).mT)) * w2c.sum()

    args, grown = ((latents(), latents(n), torch.randn(1, n + 4, 4, 4)) for n in (2, 3))
    assert found(fn, args, grown) == [("decode", "it has history keys")]


def test_history_that_is_returned_with_the_new_keys(found):
    def fn(x, cache):
        q = heads(x.flatten(2).mT)
        key = torch.cat([cache[:, :, 64:], q * 2], 2)
        return F.scaled_dot_product_attention(q, key, key), key

    assert found(fn, (latents(), kv(128))) == [("decode", "it has history keys")]


def test_padding_in_front_of_the_keys_is_no_history(found):
    def fn(x, words):
        q = heads(x.flatten(2).mT)
        n = words.shape[1]
        key = q.new_zeros(1, 2, 256, 8)
        key[:, :, :n] = heads(words)
        key[:, :, n : n + 64] = q * 2
        key = key[:, :, : n + 64]
        return F.scaled_dot_product_attention(q, key, key)

    args, grown = ((latents(), torch.randn(1, n, 16)) for n in (32, 48))
    ((role, _),) = found(fn, args, grown)
    assert role == "self"


def in_place(x, cache, start, window=1024, write=None):
    q = heads(x.flatten(2).mT)
    stop = start + q.shape[2]
    (write or put)(cache, start, stop, q * 2)
    key = cache[:, :, max(0, stop - window) : stop]
    return F.scaled_dot_product_attention(q, key, key)


def put(cache, start, stop, new):
    cache[:, :, start:stop] = new


def put_at_positions(cache, start, stop, new):
    cache[:, :, torch.arange(start, stop)] = new


@pytest.mark.parametrize("write", [put, put_at_positions], ids=["slice", "positions"])
@pytest.mark.parametrize("window", [1024, 160])
def test_cache_that_is_written_in_place(found, window, write):
    def fn(x, cache, start):
        return in_place(x, cache, start, window, write)

    calls = [(latents(), kv(512), start) for start in (64, 192)]
    assert found(fn, *calls) == [("decode", "it has history keys")]


def test_first_call_that_fills_a_cache(found):
    reason = "its keys are written to %l_cache_"
    assert found(in_place, (latents(), kv(512), 0)) == [("prefill", reason)]


def test_cache_that_begins_with_text(found):
    calls = [(latents(), kv(512), start) for start in (70, 134)]
    ((role, reason),) = found(in_place, *calls)
    assert role == "other"
    assert reason.endswith("history must be whole latents of 16 tokens")


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (lambda k, q: k[:, :, :32], "its keys are part of %l_k_, as those of a cache are"),
        (lambda k, q: k.narrow(2, 0, 32), "its keys are part of %l_k_, as those of a cache are"),
        (lambda k, q: k[:, :1].expand(-1, 2, -1, -1), "its keys are part of %l_k_"),
        (lambda k, q: k[:, :, :32] * 2, "its keys are part of %l_k_"),
        (lambda k, q: torch.slice_scatter(k, q[:, :, :8], 2, 0, 8), "its keys are made from"),
        (lambda k, q: (k[:, :, :8].copy_(q[:, :, :8]), k)[1], "its keys are read from %l_k_"),
        (lambda k, q: k.index_copy_(2, torch.arange(8), q[:, :, :8]), "its keys are read from"),
        (lambda k, q: q[:, :, ::2] * 2, "its keys are made from %q, as q is"),
    ],
    ids=["slice", "narrow", "expand", "scaled", "scattered", "written", "index_copy_", "own"],
)
def test_keys_that_may_be_of_a_cache_are_not_cross(found, keys, why):
    def fn(x, k):
        q = heads(x.flatten(2).mT) * 1.5
        key = keys(k, q)
        return F.scaled_dot_product_attention(q, key, key)

    ((role, reason),) = found(fn, (latents(), kv(64)))
    assert role == "other"
    assert reason.startswith(why)


def test_keys_that_the_graph_projects_from_part_of_an_input_are_cross(found):
    def fn(x, words):
        key = heads(words[:, :6] @ words.new_ones(16, 16))
        return F.scaled_dot_product_attention(heads(x.flatten(2).mT), key, key)

    args = (latents(), torch.randn(1, 9, 16))
    assert found(fn, args) == [("cross", "no key is made from the tokens of q")]


def test_length_that_is_declared_as_anything_in_a_range(trace, apply):
    args = (latents(), kv(6), kv(64))
    torch._dynamo.mark_dynamic(args[2], 2, min=16, max=640)
    gm = trace(attend, args)
    apply(gm, TEXT)
    ((_, site),) = sites(gm.graph)
    assert site.role == "other"
    assert "mark_dynamic declares sizes from 16 to 640" in site.reason
    assert not site.q_grid


class Frames(torch.nn.Module):
    """Patches of single frames `[B, F, C, Y, X]`, then attention as `way` says."""

    def __init__(self, way):
        super().__init__()
        self.way, self.patch = way, torch.nn.Conv2d(4, 16, 2, 2)

    def forward(self, x):
        b, f = x.shape[:2]
        h = self.patch(x.flatten(0, 1)).flatten(2).mT
        if self.way == "video":
            h = h.unflatten(0, (b, f)).flatten(1, 2)
        if self.way == "apart":
            h = self.patch(x.flatten(0, 1)).unflatten(0, (b, f)).flatten(3).mT.flatten(1, 2)
        if self.way == "time":
            h = h.unflatten(0, (b, f)).transpose(1, 2).flatten(0, 1)
        q = heads(h)
        return F.scaled_dot_product_attention(q, q * 2, q * 3)


@pytest.mark.parametrize(
    ("way", "grid"), [("video", (5, 4, 6)), ("apart", (5, 4, 6)), ("frame", (1, 4, 6))]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_grid_of_frames_that_are_patched_one_by_one(trace, apply, way, grid, batch):
    gm = trace(Frames(way), (torch.randn(batch, 5, 4, 8, 12),))
    apply(gm, TEXT)
    ((_, site),) = sites(gm.graph)
    assert (site.role, site.q_grid) == ("self", grid)


def test_batch_of_one_is_no_axis_of_the_grid(trace, apply):
    def fn(x, shift):
        h = (x + 1).flatten(2).mT
        h = h + shift.reshape(1, 1, 64, 16).reshape(1, 64, 16)
        q = heads(h)
        return F.scaled_dot_product_attention(q, q * 2, q * 3)

    gm = trace(fn, (latents(), torch.randn(64, 16)))
    apply(gm, TEXT)
    ((_, site),) = sites(gm.graph)
    assert site.q_grid == (4, 4, 4)


def test_attention_along_time_says_so(found):
    ((role, reason),) = found(Frames("time"), (torch.randn(2, 5, 4, 8, 12),))
    assert (role, reason) == ("other", token_grid.OVER_TIME)


def test_features_that_are_tied_to_one_number_by_a_guard_are_known(found):
    def fn(x, text, history):
        q = x.flatten(2).mT[:, None]
        q = q if x.shape[1] == 8 else q[..., :8]
        key = torch.cat([text, history, q], 2)
        return F.scaled_dot_product_attention(q, key, key)

    wide, narrow = (torch.randn(1, n, 4, 4, 4) for n in (12, 8))
    calls = [(x, kv(6, h=1), kv(n, h=1)) for x, n in ((wide, 128), (narrow, 192))]
    assert found(fn, *calls) == [("decode", "it has history keys")]
