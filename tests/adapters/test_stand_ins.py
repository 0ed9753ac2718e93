"""Flash attention and its kin are seen by Dynamo, and mean what they meant."""

import sys
import types

import pytest
import torch
from torch import nn

import lipass
from lipass.adapters.host_ints import HostInts
from lipass.adapters.stand_ins import stand_in


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """Have the signature of version 2; the library itself needs a GPU."""
    return ("original", softcap, alibi_slopes, dropout_p)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), block_table=None,
):  # fmt: skip
    return "original"


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1),
    rotary_interleaved=True, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    return "original"


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **_):
    return "original"


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    return "original"


def _operands(lq=6, lk=6, heads=2, kv_heads=2):
    torch.manual_seed(0)
    return torch.randn(2, lq, heads, 8), *torch.randn(2, 2, lk, kv_heads, 8)


def _by_hand(q, k, v, seen=None, scale=None):
    """Attend as the definition says; `seen` is `[.., Lq, Lk]`."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def _band(lq, lk, left, right):
    own = torch.arange(lq)[:, None] + lk - lq
    key = torch.arange(lk)
    seen = torch.ones(lq, lk, dtype=torch.bool)
    if left >= 0:
        seen &= key >= own - left
    if right >= 0:
        seen &= key <= own + right
    return seen


@pytest.mark.parametrize(("lq", "lk"), [(6, 6), (3, 7), (1, 5)])
@pytest.mark.parametrize(
    ("given", "left", "right"),
    [
        ({}, -1, -1),
        ({"causal": True}, -1, 0),
        ({"window_size": (2, 0)}, 2, 0),
        ({"window_size": (1, 1)}, 1, 1),
        ({"window_size": (2, 5), "causal": True}, 2, 0),
    ],
)
def test_windows_and_causality_end_at_the_last_key(lq, lk, given, left, right):
    q, k, v = _operands(lq, lk)
    got = stand_in(flash_attn_func)(q, k, v, **given)
    torch.testing.assert_close(got, _by_hand(q, k, v, _band(lq, lk, left, right)))


def test_fewer_heads_of_keys_and_a_scale_by_position():
    q, k, v = _operands(heads=4, kv_heads=2)
    got = stand_in(flash_attn_func)(q, k, v, 0.0, 0.3)
    torch.testing.assert_close(got, _by_hand(q, k, v, scale=0.3))


@pytest.mark.parametrize(
    "given", [{"dropout_p": 0.1}, {"softcap": 3.0}, {"alibi_slopes": torch.ones(2)}]
)
def test_what_is_no_plain_attention_goes_to_the_original(given):
    assert stand_in(flash_attn_func)(*_operands(), **given)[0] == "original"


def test_sums_of_the_softmax_go_to_the_original():
    assert stand_in(flash_attn_func)(*_operands(), return_attn_probs=True)[0] == "original"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(4, 4), (3, 5)])
def test_packed_sequences_see_themselves_only(lengths, causal):
    ends = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    q, k, v = torch.randn(3, 8, 2, 8)
    got = stand_in(flash_attn_varlen_func)(
        q, k, v, ends, ends, max(lengths), max(lengths), causal=causal
    )
    parts = [x.split(lengths) for x in (q, k, v)]
    for i, out in enumerate(got.split(lengths)):
        own = [part[i][None] for part in parts]
        seen = _band(lengths[i], lengths[i], -1, 0) if causal else None
        torch.testing.assert_close(out[None], _by_hand(*own, seen))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("given", "lengths"),
    [
        ({}, (7, 7)),
        ({"cache_seqlens": 5}, (5, 5)),
        ({"cache_seqlens": torch.tensor([3, 7])}, (3, 7)),
    ],
)
def test_a_cache_is_read_as_far_as_it_is_filled(given, lengths, causal):
    q, k, v = _operands(3, 7)
    got = stand_in(flash_attn_with_kvcache)(q, k, v, causal=causal, **given)
    for i, keys in enumerate(lengths):
        seen = _band(3, keys, -1, 0) if causal else None
        expected = _by_hand(q[i : i + 1], k[i : i + 1, :keys], v[i : i + 1, :keys], seen)
        torch.testing.assert_close(got[i : i + 1], expected)


@pytest.mark.parametrize(
    "given",
    [
        {"k": torch.randn(2, 1, 2, 8), "v": torch.randn(2, 1, 2, 8)},
        {"cache_batch_idx": torch.tensor([1, 0])},
        {"block_table": torch.zeros(2, 1, dtype=torch.int32)},
        {"rotary_cos": torch.ones(7, 4), "rotary_sin": torch.ones(7, 4)},
        {"return_softmax_lse": True},
    ],
)
def test_a_cache_that_is_written_or_paged_goes_to_the_original(given):
    assert stand_in(flash_attn_with_kvcache)(*_operands(3, 7), **given) == "original"


def test_heads_come_first_where_sage_says_so():
    q, k, v = _operands()
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    got = stand_in(sageattn)(*turned, is_causal=False)
    torch.testing.assert_close(got.transpose(1, 2), _by_hand(q, k, v))
    torch.testing.assert_close(stand_in(sageattn)(q, k, v, tensor_layout="NHD"), _by_hand(q, k, v))


def test_a_bias_is_added_and_one_of_the_library_is_not_read():
    q, k, v = _operands()
    seen = _band(6, 6, -1, 0)
    bias = torch.zeros(6, 6).masked_fill(~seen, float("-inf"))
    plain = stand_in(memory_efficient_attention)
    torch.testing.assert_close(plain(q, k, v, attn_bias=bias), _by_hand(q, k, v, seen))
    torch.testing.assert_close(
        plain(q[:, :, 0], k[:, :, 0], v[:, :, 0])[:, :, None],
        _by_hand(q[:, :, :1], k[:, :, :1], v[:, :, :1]),
    )
    assert plain(q, k, v, attn_bias=object()) == "original"


_WAN = """
import torch
try:
    import flash_attn
except ModuleNotFoundError:
    pass
from torch import nn

def flash_attention(q, k, v, q_lens=None, k_lens=None, dropout_p=0., softmax_scale=None,
                    q_scale=None, causal=False, window_size=(-1, -1), deterministic=False,
                    dtype=torch.bfloat16, version=None):
    assert q.device.type == 'cuda'
    return flash_attn.flash_attn_varlen_func(q, k, v, q_lens, k_lens)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x, k_lens=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return flash_attention(q=q, k=k, v=v, k_lens=k_lens).flatten(2)
"""


@pytest.fixture
def stranger():
    """Yield a module of somebody else's code, whose attention asks for a GPU."""
    module = types.ModuleType("stranger_wan")
    sys.modules["stranger_wan"] = module
    exec(compile(_WAN, "stranger_wan.py", "exec"), vars(module))
    yield module
    del sys.modules["stranger_wan"]


def _expected(model, x, lengths):
    q, k, v = model.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
    seen = torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None, None, None]
    return _by_hand(q, k, v, seen).flatten(2)


@pytest.mark.parametrize("lengths", [None, [6, 6], [4, 4], [6, 3]])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_attention_that_asks_for_a_gpu_is_one_graph(stranger, fresh_dynamo, lengths, as_tensor):
    model, x = stranger.Block(), torch.randn(2, 6, 16)
    with lipass.adopt(model) as adoption, torch.no_grad():
        assert [one.where for one in adoption.changes] == ["stranger_wan.py:9"]
        fast = torch.compile(
            model, backend="light_interaction", options={"inner": "eager"}, fullgraph=True
        )
        given = torch.tensor(lengths) if as_tensor and lengths else lengths
        torch.testing.assert_close(fast(x, given), _expected(model, x, lengths or [6, 6]))
    with pytest.raises(AssertionError):
        model(x)


def test_lengths_that_are_sizes_are_cut(stranger):
    model, x = stranger.Block(), torch.randn(2, 6, 16)
    with lipass.adopt(model), torch.no_grad():
        got = model(x, HostInts([4, 4]))
    torch.testing.assert_close(got, _expected(model, x, [4, 4]))


def test_what_stays_breaks_the_graph_with_its_reason(fresh_dynamo):
    plain = stand_in(flash_attn_func)

    class Capped(nn.Module):
        def forward(self, x):
            return plain(x * 2, x, x, softcap=2.0)[0]

    fast = torch.compile(Capped(), backend="light_interaction", options={"inner": "eager"})
    fast(torch.randn(1, 4, 2, 8))
    assert "softcap" in lipass.report().graph_breaks[0].reason


def test_a_library_bound_as_a_module_is_replaced_as_one(stranger, fresh_dynamo):
    library = types.ModuleType("flash_attn")
    inner = types.ModuleType("flash_attn.flash_attn_interface")
    inner.flash_attn_func, library.flash_attn_interface = flash_attn_func, inner
    library.other = object()
    stranger.ops = library

    def flash_attention(q, k, v, k_lens=None):
        return stranger.ops.flash_attn_interface.flash_attn_func(q, k, v)

    q, k, v = _operands()
    with lipass.adopt(stranger.Block()):
        assert stranger.ops is not library
        assert stranger.ops.other is library.other
        torch.testing.assert_close(flash_attention(q, k, v), _by_hand(q, k, v))
    assert stranger.ops is library
    assert inner.flash_attn_func is flash_attn_func
