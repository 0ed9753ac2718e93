# ruff: noqa: E501  (goldens: one line is one node)
"""Tokens in tile order: most graphs are left alone, with the call that stops them."""

import re

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from lipass.examples.tinyworld.model import ModelConfig, TinyWorld
from lipass.kernels import registry
from lipass.kernels.block_sparse import flex
from lipass.passes.attention.sparse_call import SparseCall
from lipass.passes.core import PassPipeline
from lipass.receipt import current_report

FACTS = "canonicalize{verify=false},find-attention{verify=false},find-poses,find-steps"
SPARSE = f"{FACTS},sparse-attention{{tile=2x2x2 budget_self=0.4 budget_decode=0.4}}"
TEXT = SPARSE + ",tile-order{grids=whole}"
GRID = (2, 4, 6)
WIDTH = 16


class Clip(nn.Module):
    """Two layers over the tokens of a clip, with rotary positions and a level for all."""

    def __init__(self, grid=GRID):
        super().__init__()
        t, y, x = grid
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        angle = torch.randn(t * y * x, 8)
        self.register_buffer("sin", angle.sin())
        self.register_buffer("cos", angle.cos())

    def forward(self, latents, level):
        grid = latents.shape[2:]
        h = self.embed(self.patches(latents)) + level[:, None]
        for i in range(2):
            h = self.between(h, grid)
            h = h + self.attend(self.qkv[i](F.layer_norm(h, (WIDTH,)))).flatten(2)
            h = h + self.mlp[i](F.silu(h))
        return self.out(self.head(h), grid)

    def patches(self, latents):
        return latents.flatten(2).mT

    def between(self, h, grid):
        return h

    def attend(self, qkv):
        q, k, v = qkv.unflatten(2, (3, 1, WIDTH)).transpose(1, 3).unbind(2)
        return self.attention(self.rotate(q), self.rotate(k), v).transpose(1, 2)

    def attention(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def rotate(self, x):
        first, second = x.chunk(2, -1)
        sin, cos = self.sin, self.cos
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def out(self, h, grid):
        return h.unflatten(1, grid).permute(0, 4, 1, 2, 3)


def given(grid=GRID):
    torch.manual_seed(1)
    return torch.randn(1, 4, *grid), torch.randn(1, WIDTH)


def with_(**methods):
    """Make a clip that does something else at one place."""
    return type("Other", (Clip,), methods)


def convolved(self, h, grid):
    kernel = torch.ones(WIDTH, 1, 3)
    return F.conv1d(h.mT, kernel, padding=1, groups=WIDTH).mT


def convolved_in_latents(self, h, grid):
    x = h.mT.unflatten(2, grid)
    return (
        F.conv3d(x, torch.ones(WIDTH, 1, 1, 3, 3), padding=(0, 1, 1), groups=WIDTH).flatten(2).mT
    )


def shifted_windows(self, h, grid):
    return h.unflatten(1, grid).roll((1, 2), (2, 3)).flatten(1, 3)


def masked_by_place(self, q, k, v):
    places = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=places[:, None] >= places - 5)


def biased_by_place(self, q, k, v):
    bias = torch.linspace(-1, 0, k.shape[2])[None, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def with_text(self, h, grid):
    words = torch.ones(1, 5, WIDTH)
    return self.mlp[0](torch.cat([h, words], 1))[:, :48]


def padded(self, h, grid):
    return F.pad(h, (0, 0, 1, 0))[:, :-1]


_ANOTHER_ORDER = "its tokens are taken in another order than that of the latents"
REFUSALS = {
    "convolution along the tokens": ({"between": convolved}, r"%conv1d \(conv1d\) may read tokens by their places"),
    "convolution in the grid between layers": ({"between": convolved_in_latents}, r"tokens leave at %\w+ and come back at %\w+: they would be moved in each layer"),
    "running sum": ({"between": lambda self, h, grid: h.cumsum(1)}, r"\(cumsum\) may read tokens by their places"),
    "shifted windows": ({"between": shifted_windows}, r"tokens leave at %\w+ and come back"),
    "roll along the tokens": ({"between": lambda self, h, grid: h.roll(1, 1)}, _ANOTHER_ORDER),
    "flip": ({"between": lambda self, h, grid: h.flip(1)}, _ANOTHER_ORDER),
    "padding": ({"between": padded}, r"\(pad\) may read"),
    "index of places": ({"between": lambda self, h, grid: h[:, torch.arange(48).flip(0)]}, _ANOTHER_ORDER),
    "half of the tokens": ({"between": lambda self, h, grid: torch.cat([h[:, :24], h[:, 24:] * 2], 1)}, r"\(getitem\) may read"),
    "tokens cut in two": ({"between": lambda self, h, grid: torch.cat(h.chunk(2, 1), 1)}, r"\(chunk\) may read"),
    "a product over tokens": ({"between": lambda self, h, grid: F.linear(h.mT, torch.eye(48)).mT}, r"\(linear\) may read"),
    "products of tokens with tokens": ({"between": lambda self, h, grid: h + (h @ h.mT) @ h}, "has two axes of them"),
    "argmax over the tokens": ({"between": lambda self, h, grid: h + h.argmax(1, keepdim=True)}, r"\(argmax\) may read"),
    "sort": ({"between": lambda self, h, grid: h.sort(1).values}, _ANOTHER_ORDER),
    "written in parts": ({"between": lambda self, h, grid: h.clone().index_fill_(1, torch.tensor([0]), 0.0)}, "writes tokens to memory"),
    "random numbers": ({"between": lambda self, h, grid: F.dropout(h, 0.1)}, r"\(dropout\) may read"),
    "bias by places": ({"attention": biased_by_place}, "a bias for each key, by its place"),
    "tokens returned": ({"out": lambda self, h, grid: h}, "is returned as tokens, which are not cut into a grid again"),
    "tokens joined with text": ({"between": with_text}, "joins tokens with others"),
}  # fmt: skip


# Behind these no grid is proven, so nothing is sparse unless it is told.
REORDERED = ("roll along the tokens", "flip", "index of places", "sort")
TOLD = TEXT.replace("attention{verify=false}", "attention{verify=false token_grid=2x4x6}", 1)


@pytest.mark.parametrize("case", REORDERED)
def test_tokens_in_another_order_are_no_grid(notes, case):
    assert notes(with_(**REFUSALS[case][0])().eval(), given(), TEXT) == []


@pytest.mark.parametrize("case", REFUSALS)
def test_order_is_kept(notes, case):
    methods, reason = REFUSALS[case]
    text = TOLD if case in REORDERED else TEXT
    ((where, action, why),) = notes(with_(**methods)().eval(), given(), text)
    assert (where, action) == ("tokens", "kept")
    assert re.search(reason, why), why


def test_tokens_of_no_grid_that_the_graph_shows_stay(notes):
    """The options say what the grid is, but not where tokens become it again."""
    model = with_(patches=lambda self, tokens: tokens, out=lambda self, h, grid: h)().eval()
    text = TEXT.replace("attention{verify=false}", "attention{token_grid=2x4x6}")
    tokens = torch.randn(1, 48, 4), torch.randn(1, WIDTH)
    ((_, action, why),) = notes(model, tokens, text)
    assert action == "kept"
    assert "no reshape from [.., T, Y, X, ..] to its tokens" in why


def test_causal_attention_over_tokens_is_no_sparse_call(notes):
    def attention(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert notes(with_(attention=attention)().eval(), given(), TEXT) == []


def test_mask_of_places_is_no_sparse_call(notes):
    assert notes(with_(attention=masked_by_place)().eval(), given(), TEXT) == []


def test_off_is_the_default(notes):
    assert notes(Clip().eval(), given(), SPARSE + ",tile-order") == []


def test_dense_graph_is_left_alone(notes):
    text = f"{FACTS},sparse-attention{{dense_layers=0x1}},tile-order{{grids=runs}}"
    assert notes(Clip().eval(), given(), text) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("tile=2x2x2x2x4x2", "queries have tiles of their own"),
        ("tile=1x1x2", "lie in the order of tiles (1, 1, 2) already"),
        ("tile=1x2x8", "do not divide the grid (2, 4, 6)"),
        ("tile=4x2x2", "do not divide the grid (2, 4, 6)"),
    ],
)
def test_tiles_that_do_not_fit_leave_the_order(notes, options, reason):
    text = TEXT.replace("tile=2x2x2", options)
    ((_, action, why),) = notes(Clip().eval(), given(), text)
    assert action == "kept"
    assert reason in why


def test_tokens_that_are_written_to_from_outside_stay(notes):
    def patches(self, latents):
        latents = latents.clone()
        tokens = latents.flatten(2).mT
        latents.mul_(2)
        return tokens

    ((_, action, why),) = notes(with_(patches=patches)().eval(), given(), TEXT)
    assert action == "kept"
    assert "is written to" in why


def test_keys_that_are_written_to_a_cache_stay(notes):
    """Who reads the cache in a later call would find them in another order."""

    class Writes(Clip):
        def forward(self, latents, level, cache):
            self.cache = cache
            return super().forward(latents, level)

        def attention(self, q, k, v):
            self.cache[:, :, :48] = k
            return super().attention(q, k, v)

    args = (*given(), torch.zeros(1, 1, 96, WIDTH))
    ((_, action, why),) = notes(Writes().eval(), args, TEXT)
    assert action == "kept"
    assert "writes tokens to memory that is not theirs" in why


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_takes_the_calls_as_they_lie(monkeypatch):
    monkeypatch.setattr(flex, "_ready", {"cpu": ""})
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    registry.reset_telemetry()
    with registry.prefer("block_sparse", "flex"):
        expected, actual = in_rows_and_in_tiles(Clip().eval(), given())
    for counts in registry.telemetry().values():
        assert counts.provider == "flex"  # of the latest call, which is in tile order
        ((why, calls),) = counts.refusals.items()
        assert "takes blocks that are runs of tokens, got tiles" in why
        assert calls == 1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_levels_by_latent_need_tiles_of_one(notes):
    def between(self, h, grid):
        t, y, x = grid
        level = torch.linspace(0, 1, t)[:, None, None]
        return (h.unflatten(1, (t, y * x)) * level).flatten(1, 2)

    model = with_(between=between)().eval()
    ((_, action, why),) = notes(model, given(), TEXT)
    assert action == "kept"
    assert "a tile of one latent, such as (1, 8, 8), may mend it" in why
    ((_, action, _),) = notes(model, given(), TEXT.replace("2x2x2", "1x2x2"))
    assert action == "rewritten"


def test_wrong_words_are_refused():
    with pytest.raises(ValueError, match="grids must be one of off, whole, runs, got 'all'"):
        PassPipeline.parse(f"{SPARSE},tile-order{{grids=all}}")


def test_clip(trace, apply):
    records, _ = apply(trace(Clip().eval(), given()), TEXT)
    assert_expected_inline(
        records[-1].diff,
        """\
+%tile_order_default: i64[48] = lipass.tile_order([2, 4, 6], [2, 2, 2], False, device(type='cpu'))
+%index_select_1: f32[48, 8] = index_select($cos, 0, %tile_order_default)
+%index_select_2: f32[48, 8] = index_select($sin, 0, %tile_order_default)
+%tile_order_default_1: i64[48] = lipass.tile_order([2, 4, 6], [2, 2, 2], True, device(type='cpu'))
-%getattr_1: f32[1, 48, 4] = getattr(%flatten, 'mT')
+%index_select: f32[1, 4, 48] = index_select(%flatten, 2, %tile_order_default)
+%getattr_1: f32[1, 48, 4] = getattr(%index_select, 'mT')
-%mul: f32[1, 1, 48, 8] = mul(%first, $cos)
-%mul_1: f32[1, 1, 48, 8] = mul(%second, $sin)
+%mul: f32[1, 1, 48, 8] = mul(%first, %index_select_1)
+%mul_1: f32[1, 1, 48, 8] = mul(%second, %index_select_2)
-%mul_2: f32[1, 1, 48, 8] = mul(%first, $sin)
-%mul_3: f32[1, 1, 48, 8] = mul(%second, $cos)
+%mul_2: f32[1, 1, 48, 8] = mul(%first, %index_select_2)
+%mul_3: f32[1, 1, 48, 8] = mul(%second, %index_select_1)
-%mul_4: f32[1, 1, 48, 8] = mul(%first_1, $cos)
-%mul_5: f32[1, 1, 48, 8] = mul(%second_1, $sin)
+%mul_4: f32[1, 1, 48, 8] = mul(%first_1, %index_select_1)
+%mul_5: f32[1, 1, 48, 8] = mul(%second_1, %index_select_2)
-%mul_6: f32[1, 1, 48, 8] = mul(%first_1, $sin)
-%mul_7: f32[1, 1, 48, 8] = mul(%second_1, $cos)
+%mul_6: f32[1, 1, 48, 8] = mul(%first_1, %index_select_2)
+%mul_7: f32[1, 1, 48, 8] = mul(%second_1, %index_select_1)
-%sparse_attention_default: f32[1, 1, 48, 16] = lipass.sparse_attention(%cat, [%cat_1], [%v], [2, 4, 6], [2, 4, 6], 'current', [2, 2, 2], 0.4, 0.25, 0, 'self', None, 'attention#1')
+%sparse_attention_default: f32[1, 1, 48, 16] = lipass.sparse_attention(%cat, [%cat_1], [%v], [2, 4, 6], [2, 4, 6], 'current', [2, 2, 2], 0.4, 0.25, 0, 'self', None, 'attention#1', tile_order='current')
-%mul_8: f32[1, 1, 48, 8] = mul(%first_2, $cos)
-%mul_9: f32[1, 1, 48, 8] = mul(%second_2, $sin)
+%mul_8: f32[1, 1, 48, 8] = mul(%first_2, %index_select_1)
+%mul_9: f32[1, 1, 48, 8] = mul(%second_2, %index_select_2)
-%mul_10: f32[1, 1, 48, 8] = mul(%first_2, $sin)
-%mul_11: f32[1, 1, 48, 8] = mul(%second_2, $cos)
+%mul_10: f32[1, 1, 48, 8] = mul(%first_2, %index_select_2)
+%mul_11: f32[1, 1, 48, 8] = mul(%second_2, %index_select_1)
-%mul_12: f32[1, 1, 48, 8] = mul(%first_3, $cos)
-%mul_13: f32[1, 1, 48, 8] = mul(%second_3, $sin)
+%mul_12: f32[1, 1, 48, 8] = mul(%first_3, %index_select_1)
+%mul_13: f32[1, 1, 48, 8] = mul(%second_3, %index_select_2)
-%mul_14: f32[1, 1, 48, 8] = mul(%first_3, $sin)
-%mul_15: f32[1, 1, 48, 8] = mul(%second_3, $cos)
+%mul_14: f32[1, 1, 48, 8] = mul(%first_3, %index_select_2)
+%mul_15: f32[1, 1, 48, 8] = mul(%second_3, %index_select_1)
-%sparse_attention_default_1: f32[1, 1, 48, 16] = lipass.sparse_attention(%cat_2, [%cat_3], [%v_1], [2, 4, 6], [2, 4, 6], 'current', [2, 2, 2], 0.4, 0.25, 0, 'self', None, 'attention#2')
+%sparse_attention_default_1: f32[1, 1, 48, 16] = lipass.sparse_attention(%cat_2, [%cat_3], [%v_1], [2, 4, 6], [2, 4, 6], 'current', [2, 2, 2], 0.4, 0.25, 0, 'self', None, 'attention#2', tile_order='current')
-%unflatten_2: f32[1, 2, 4, 6, 4] = %linear_5.unflatten(1, (2, 4, 6))
+%index_select_3: f32[1, 48, 4] = index_select(%linear_5, 1, %tile_order_default_1)
+%unflatten_2: f32[1, 2, 4, 6, 4] = %index_select_3.unflatten(1, (2, 4, 6))
""",
    )


def compiled(model, **options):
    options = {
        "preset": "sparse", "inner": "eager", "sparse.tile": (2, 2, 2), "sparse.budget": 0.4,
        "sparse.dense_tokens": 0, "sparse.tile_order": "whole",
    } | options  # fmt: skip
    return torch.compile(model, backend="light_interaction", options=options)


def in_rows_and_in_tiles(model, args, **options):
    """Run a model in rows and in tile order."""
    results = []
    for order in ("off", options.pop("sparse.tile_order", "whole")):
        torch._dynamo.reset()
        with torch.no_grad(), registry.force("sparse"):
            results.append(compiled(model, **options, **{"sparse.tile_order": order})(*args))
    return results


def rotated_in_place(self, x):
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = first * self.cos - second * self.sin
    out[..., 1::2] = first * self.sin + second * self.cos
    return out


def linear_attention(self, h, grid):
    memory = torch.einsum("blc,bld->bcd", h.softmax(-1), h)
    return h + h.softmax(1) @ memory + h.mean(1, keepdim=True)


def by_latents(self, h, grid):
    t, y, x = grid
    frames = h.unflatten(1, (t, y * x))
    turn = torch.linspace(0, 1, t)[None, :, None, None] * torch.eye(WIDTH)
    return torch.einsum("bfpc,bfcd->bfpd", frames, turn).reshape(1, t * y * x, WIDTH)


def cross(self, h, grid):
    words = torch.linspace(-1, 1, 5 * WIDTH).view(1, 5, WIDTH)
    return h + F.scaled_dot_product_attention(h[:, None], words[:, None], words[:, None])[:, 0]


EQUAL = {
    "plain": ({}, {}),
    "tiles of one latent": ({}, {"sparse.tile": (1, 2, 2)}),
    "rotary positions written in parts": ({"rotate": rotated_in_place}, {}),
    "linear attention, means and softmax": ({"between": linear_attention}, {}),
    "products by latents": ({"between": by_latents}, {"sparse.tile": (1, 2, 2)}),
    "attention by hand": (
        {"between": lambda self, h, grid: h + (h @ h.mT).softmax(-1) @ h},
        {},
    ),
    "cross-attention": ({"between": cross}, {}),
    "first latent always visited": ({}, {"sparse.sink_latents": 1, "sparse.tile": (1, 2, 2)}),
}


@pytest.mark.parametrize("case", EQUAL)
@pytest.mark.usefixtures("fresh_dynamo")
def test_result_is_the_same_in_either_order(case):
    methods, options = EQUAL[case]
    expected, actual = in_rows_and_in_tiles(with_(**methods)().eval(), given(), **options)
    (said,) = [one for one in current_report().passes if one.name == "tile-order"][-1].notes
    assert said.startswith("tokens: rewritten, in tile order for")
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("fresh_dynamo")
def test_runs_waste_no_slots_at_borders(notes):
    """Which keys are chosen may change at borders; where all are visited, nothing does."""
    grid = (3, 5, 7)
    model = Clip(grid).eval()
    text = TEXT.replace("2x2x2", "2x2x4").replace("whole", "runs")
    ((_, action, why),) = notes(model, given(grid), text)
    assert action == "rewritten"
    assert why == "in tile order for 2 calls: slots a useful pair 3.34 to 1.14"
    options = {"sparse.tile": (2, 2, 4), "sparse.budget": 0.9999, "sparse.tile_order": "runs"}
    expected, actual = in_rows_and_in_tiles(model, given(grid), **options)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    model = TinyWorld(ModelConfig(width=48, text_width=16, blocks=2)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def decode(model, n):
    torch.manual_seed(n)
    w2c = torch.eye(4).repeat(1, n + 4, 1, 1)
    w2c[0, :, 0, 3] = torch.linspace(0, 3, n + 4)
    with torch.no_grad():
        text = model.text(torch.zeros(1, 32, dtype=torch.long))
    history = [tuple(torch.randn(1, 3, n * 64, 16) for _ in "kv") for _ in range(2)]
    return torch.randn(1, 16, 4, 8, 8), torch.full((1, 4), 0.9), w2c, text, history


def prefill(model, n):
    _, _, w2c, text, _ = decode(model, n)
    return torch.randn(1, 16, n, 8, 8), torch.zeros(1, n), w2c, text


def test_cache_keeps_the_order_of_the_model(notes, world):
    text = TEXT.replace("2x2x2", "1x4x4")
    ((where, action, why),) = notes(world, prefill(world, 4), text)
    assert (where, action) == ("tokens", "kept")
    assert "is returned: a cache keeps the order of the model" in why


def test_cameras_by_latent_need_tiles_of_one(notes, world):
    ((_, action, why),) = notes(world, decode(world, 4), TEXT)
    assert action == "kept"
    assert "by their places" in why or "lie by latents" in why


@pytest.mark.usefixtures("fresh_dynamo")
def test_decode_of_tinyworld_is_the_same_in_tile_order(notes, world):
    """History lies as the cache has it; whatever its length, one graph serves."""
    text = TEXT.replace("2x2x2", "1x4x4")
    ((_, action, why),) = notes(world, decode(world, 4), text, decode(world, 8))
    assert action == "rewritten", why
    expected, actual = in_rows_and_in_tiles(world, decode(world, 6), **{"sparse.tile": (1, 4, 4)})
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("fresh_dynamo")
def test_loop_in_the_graph_is_in_tile_order_with_the_history_that_it_makes(
    trace, apply, mini, inputs
):
    args = inputs(4).chunk
    gm = trace(mini.chunk, args)
    records, _ = apply(gm, TEXT)
    ((action, why),) = [(note.action, note.reason) for note in records[-1].notes]
    assert action == "rewritten", why
    calls = SparseCall.nodes(gm.graph)
    orders = [(call.role, call.tile_order) for call in map(SparseCall.of, calls)]
    assert orders == [("prefill", "current")] + [("decode", "history,current")] * 6
    expected, actual = in_rows_and_in_tiles(mini.chunk, args)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
