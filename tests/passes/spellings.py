"""Spell one attention in all the ways it is written in, and many things that only look like it.

A spelling takes q `[B, H, L, D]` and the keys and values in pieces `[B, H, L_i, D]`, a near miss
takes them whole; both return `[B, H, L, D]`. A form is `positional`, `keyword`, `casts` or
`transposes`.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import lipass.kernels.ops  # noqa: F401  (registers the operator)

SPELLINGS = {}
NEAR_MISSES = {}
SCALE = 8**-0.5

FACTS = "canonicalize,find-attention"
NAMED = FACTS + "{segments=text+history+current}"
SPARSE = torch.ops.lipass.sparse_attention.default


def heads(x):
    """`[B, C, T, Y, X]` to `[B, H, L, D]`."""
    return x.flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)


def model(attend):
    """Attend from latents to text, history and themselves."""

    def run(x, text, history):
        q = heads(x)
        keys = [text, history, q * 2]
        return attend(q, keys, [k + 1 for k in keys])

    return run


def args(dtype=torch.float32):
    shapes = (1, 16, 4, 4, 4), (1, 2, 6, 8), (1, 2, 32, 8)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def spelling(name, form):
    def register(fn):
        SPELLINGS[f"{name}-{form}"] = fn
        return fn

    return register


def near_miss(reason):
    def register(fn):
        NEAR_MISSES[fn.__name__] = fn, reason
        return fn

    return register


def cat(pieces):
    return torch.cat(pieces, 2)


def swap(x):
    return x.transpose(1, 2)


def cat_blhd(pieces):
    return torch.cat([swap(x) for x in pieces], 1)


@torch.library.custom_op("flash_attn::flash_attn_func", mutates_args=())
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    gqa = q.shape[2] != k.shape[2]
    q, k, v = swap(q), swap(k), swap(v)
    out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=gqa)
    return swap(out).contiguous()


@flash_attn_func.register_fake
def _(q, k, v, *_):
    return torch.empty_like(q)


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def flash_attn_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out = flash_attn_func(q, k, v, dropout_p, softmax_scale)
    return out, out.sum(-1)


@flash_attn_forward.register_fake
def _(q, k, v, *_):
    return torch.empty_like(q), q.new_empty(q.shape[:3])


@torch.library.custom_op("flash_attn::flash_attn_varlen_func", mutates_args=())
def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor
) -> torch.Tensor:
    return flash_attn_func(q[None], k[None], v[None])[0]


@flash_attn_varlen_func.register_fake
def _(q, k, v, _):
    return torch.empty_like(q)


@spelling("sdpa", "positional")
def _(q, keys, values):
    return F.scaled_dot_product_attention(q, cat(keys), cat(values), None, 0.0, False)


@spelling("sdpa", "keyword")
def _(q, keys, values):
    k, v = torch.cat(keys, dim=-2), torch.concat(values, dim=2)
    return F.scaled_dot_product_attention(value=v, key=k, query=q, scale=0.3)


@spelling("sdpa", "casts")
def _(q, keys, values):
    k, v = cat(keys).double(), cat(values).double()
    return F.scaled_dot_product_attention(q.double(), k, v).to(q.dtype)


@spelling("sdpa", "transposes")
def _(q, keys, values):
    k, v = cat_blhd(keys).transpose(2, 1), cat_blhd(values).permute(0, 2, 1, 3).contiguous()
    return F.scaled_dot_product_attention(q, k, v)


@spelling("sdpa heads split behind the concatenation", "transposes")
def _(q, keys, values):
    k, v = (torch.cat([swap(x).flatten(2) for x in xs], 1) for xs in (keys, values))
    k, v = k.unflatten(2, (2, 8)).transpose(1, 2), swap(v.view(1, -1, 2, 8))
    return F.scaled_dot_product_attention(q, k, v)


@spelling("sdpa grouped heads", "keyword")
def _(q, keys, values):
    k, v = cat([x[:, :1] for x in keys]), cat([x[:, 1:] for x in values])
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@spelling("diffusers dispatch", "keyword")
def _(q, keys, values):
    query, key, value = swap(q), cat_blhd(keys), cat_blhd(values)
    query, key, value = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        query=query,
        key=key,
        value=value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    )
    return out.permute(0, 2, 1, 3).transpose(1, 2)


@spelling("two streams on the batch", "keyword")
def _(q, keys, values):
    query = torch.cat([q, q * 0.5], dim=0)
    key = torch.cat([cat(keys), cat([k + 1 for k in keys])], dim=0)
    value = torch.cat([cat(values), cat([v - 1 for v in values])], dim=0)
    a, b = F.scaled_dot_product_attention(query=query, key=key, value=value).chunk(2, dim=0)
    return a + b


@spelling("operator @", "positional")
def _(q, keys, values):
    return torch.softmax((q @ cat(keys).mT) * SCALE, -1) @ cat(values)


@spelling("operator @", "keyword")
def _(q, keys, values):
    scores = SCALE * (q @ cat(keys).transpose(dim0=-2, dim1=-1))
    return scores.softmax(dim=-1) @ cat(values)


@spelling("operator @", "casts")
def _(q, keys, values):
    scores = (q @ cat(keys).transpose(-2, -1)) * SCALE
    return scores.float().softmax(-1).type_as(q) @ cat(values)


@spelling("operator @", "transposes")
def _(q, keys, values):
    k = cat_blhd(keys).permute(0, 2, 3, 1)
    v = cat_blhd(values).swapaxes(1, 2)
    return (q @ k * SCALE).softmax(-1) @ v


@spelling("torch.matmul", "positional")
def _(q, keys, values):
    return torch.matmul(F.softmax(torch.matmul(q, cat(keys).mT) / math.sqrt(8), -1), cat(values))


@spelling("torch.matmul", "keyword")
def _(q, keys, values):
    scores = torch.matmul(input=q, other=cat(keys).mT)
    weights = F.softmax(input=torch.mul(scores, SCALE), dim=-1)
    return torch.matmul(input=weights, other=cat(values))


@spelling("torch.matmul", "casts")
def _(q, keys, values):
    scores = torch.matmul(q.float(), cat(keys).float().mT) * SCALE
    return torch.matmul(F.softmax(scores, -1, dtype=torch.float32).to(q.dtype), cat(values))


@spelling("torch.matmul", "transposes")
def _(q, keys, values):
    k = torch.transpose(torch.permute(cat_blhd(keys), (0, 2, 1, 3)), 3, 2)
    v = torch.swapaxes(cat_blhd(values), 1, 2)
    return torch.matmul(torch.softmax(torch.matmul(q, k), -1), v)


@spelling("methods", "positional")
def _(q, keys, values):
    return q.matmul(cat(keys).mT).mul(SCALE).softmax(-1).matmul(cat(values))


@spelling("methods", "keyword")
def _(q, keys, values):
    return q.matmul(cat(keys).mT).div(other=math.sqrt(8)).softmax(dim=-1).matmul(cat(values))


def merged(x):
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2], x.shape[3])


@spelling("bmm", "positional")
def _(q, keys, values):
    q3, k, v = merged(q), merged(cat(keys)), merged(cat(values))
    out = torch.bmm(torch.softmax(torch.bmm(q3, k.transpose(1, 2)) * SCALE, -1), v)
    return out.reshape(q.shape)


@spelling("bmm", "keyword")
def _(q, keys, values):
    q3, k, v = merged(q), merged(cat(keys)), merged(cat(values))
    weights = torch.bmm(input=q3, mat2=k.mT).mul(SCALE).softmax(dim=-1)
    return torch.bmm(input=weights, mat2=v).view(q.shape)


@spelling("bmm", "casts")
def _(q, keys, values):
    q3, k, v = merged(q), merged(cat(keys)), merged(cat(values))
    weights = torch.bmm(q3, k.mT).mul(SCALE).softmax(-1, dtype=torch.float32)
    return torch.bmm(weights.to(v.dtype), v).view(q.shape)


@spelling("bmm", "transposes")
def _(q, keys, values):
    q3 = q.flatten(0, 1)
    k, v = (cat_blhd(x).transpose(1, 2).flatten(0, 1) for x in (keys, values))
    return torch.bmm(q3.bmm(k.permute(0, 2, 1)).softmax(2), v).unflatten(0, q.shape[:2])


@spelling("baddbmm", "keyword")
def _(q, keys, values):
    q3, k, v = merged(q), merged(cat(keys)), merged(cat(values))
    empty = torch.empty(q3.shape[0], q3.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q3, k.transpose(-1, -2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(dim=-1), v).reshape(q.shape)


@spelling("baddbmm", "casts")
def _(q, keys, values):
    q3, k, v = merged(q), merged(cat(keys)), merged(cat(values))
    empty = torch.empty(q3.shape[0], q3.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q3, k.transpose(-1, -2), beta=0, alpha=SCALE)
    return torch.bmm(scores.float().softmax(-1).to(q.dtype), v).reshape(q.shape)


@spelling("einsum", "positional")
def _(q, keys, values):
    weights = F.softmax(torch.einsum("bhqd,bhkd->bhqk", q, cat(keys)) * SCALE, -1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, cat(values))


@spelling("einsum", "casts")
def _(q, keys, values):
    scores = torch.einsum("b h i d, b h j d -> b h i j", q.float(), cat(keys).float()) / 2
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1).to(q.dtype), cat(values))


@spelling("einsum", "transposes")
def _(q, keys, values):
    scores = torch.einsum("bqhd,bkhd->bhqk", swap(q), cat_blhd(keys)) * SCALE
    return swap(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), cat_blhd(values)))


@spelling("q scaled before", "positional")
def _(q, keys, values):
    return ((q * SCALE) @ cat(keys).mT).softmax(-1) @ cat(values)


@spelling("q and k scaled before", "positional")
def _(q, keys, values):
    root = 8**-0.25
    return ((q * root) @ (cat([k * root for k in keys])).mT).softmax(-1) @ cat(values)


@spelling("scale applied twice", "positional")
def _(q, keys, values):
    return (q @ cat(keys).mT * 0.5 / 1.5).softmax(-1) @ cat(values)


@spelling("nn.Softmax and nn.Dropout in eval", "keyword")
def _(q, keys, values):
    weights = nn.Softmax(dim=-1)(q @ cat(keys).mT * SCALE)
    return nn.Dropout(0.1).eval()(weights) @ cat(values)


@spelling("flash_attn", "positional")
def _(q, keys, values):
    return swap(flash_attn_func(swap(q), cat_blhd(keys), cat_blhd(values), 0.0, 0.3))


@spelling("flash_attn", "keyword")
def _(q, keys, values):
    k, v = cat_blhd(keys), cat_blhd(values)
    return swap(flash_attn_func(q=swap(q), k=k, v=v, dropout_p=0.0, softmax_scale=None))


@spelling("flash_attn", "casts")
def _(q, keys, values):
    q16, k, v = (x.to(torch.bfloat16) for x in (swap(q), cat_blhd(keys), cat_blhd(values)))
    return swap(flash_attn_func(q16, k, v)).to(q.dtype)


@spelling("flash_attn", "transposes")
def _(q, keys, values):
    k, v = swap(cat(keys)).contiguous(), swap(cat(values)).contiguous()
    return swap(flash_attn_func(swap(q).contiguous(), k, v))


@spelling("flash_attn grouped heads", "positional")
def _(q, keys, values):
    k, v = cat_blhd([x[:, :1] for x in keys]), cat_blhd([x[:, 1:] for x in values])
    return swap(flash_attn_func(swap(q), k, v))


@spelling("flash_attn with its log-sum-exp", "positional")
def _(q, keys, values):
    out, _ = flash_attn_forward(swap(q), cat_blhd(keys), cat_blhd(values), 0.0, 0.3)
    return swap(out)


@spelling("flex_attention", "positional")
def _(q, keys, values):
    return flex_attention(q, cat(keys), cat(values))


@spelling("flex_attention", "keyword")
def _(q, keys, values):
    return flex_attention(query=q, key=cat(keys), value=cat(values), scale=0.3)


@near_miss("dropout is 0.1")
def dropout_in_training(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.1, True) @ v


@near_miss("%add_1 adds to its scores")
def additive_bias(q, k, v):
    return (q @ k.mT + 1.0).softmax(-1) @ v


@near_miss("it has a mask [1, 1, 64, 64], which may differ between queries")
def causal_by_a_bias(q, k, v):
    bias = torch.full((64, 64), -1e9).triu(1)
    return ((q @ k.mT) * SCALE + bias).softmax(-1) @ v


@near_miss("it has a mask [1, 2, 64, 1], which may differ between queries")
def data_dependent_mask(q, k, v):
    return (q @ k.mT).masked_fill(q.sum(-1, keepdim=True) > 0, -1e9).softmax(-1) @ v


@near_miss("it has a mask")
def mask_by_where(q, k, v):
    scores = q @ k.mT
    return torch.where(k.sum(-1)[:, :, None] > 0, scores, -1e9).softmax(-1) @ v


@near_miss("%masked_fill masks its scores by -5, which hides no key")
def scores_that_are_lowered(q, k, v):
    return (q @ k.mT).masked_fill(q.sum(-1, keepdim=True) > 0, -5).softmax(-1) @ v


@near_miss("%masked_fill_ writes to its scores in place")
def scores_masked_in_place(q, k, v):
    scores = q @ k.mT
    scores.masked_fill_(q.sum(-1, keepdim=True) > 0, -1e9)
    return scores.softmax(-1) @ v


@near_miss("%tril masks its weights")
def causal_behind_the_softmax(q, k, v):
    return (q @ k.mT).softmax(-1).tril() @ v


@near_miss("%exp scales its scores and is no constant")
def scale_that_is_a_tensor(q, k, v):
    return (q @ k.mT * q.mean().exp()).softmax(-1) @ v


@near_miss("%sqrt scales its scores and is no constant")
def scale_that_is_a_tensor_of_a_constant(q, k, v):
    return (q @ k.mT / torch.tensor(8.0).sqrt()).softmax(-1) @ v


@near_miss("%mul_1 scales its weights behind the softmax")
def scale_behind_the_softmax(q, k, v):
    return ((q @ k.mT).softmax(-1) * SCALE) @ v


@near_miss("its scale is -0.5")
def negative_scale(q, k, v):
    return (q @ k.mT * -0.5).softmax(-1) @ v


@near_miss("its softmax is over axis 2 of 4, not over the keys")
def softmax_over_the_queries(q, k, v):
    return (q @ k.mT).softmax(2) @ v


@near_miss("its softmax is over axis 1 of 4, not over the keys")
def softmax_over_the_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


@near_miss("its softmax is applied twice")
def softmax_applied_twice(q, k, v):
    return (q @ k.mT).softmax(-1).softmax(-1) @ v


@near_miss("its weights come from sigmoid, not from softmax")
def sigmoid(q, k, v):
    return (q @ k.mT * SCALE).sigmoid() @ v


@near_miss("its weights come from relu, not from softmax")
def relu(q, k, v):
    return F.relu(q @ k.mT) @ v


@near_miss("%sum_1 scales its weights and is no constant")
def weights_that_are_normalised_again(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@near_miss("%tanh changes its scores")
def capped_scores(q, k, v):
    return ((q @ k.mT).tanh() * 30).softmax(-1) @ v


@near_miss("%getitem changes its weights")
def sink_that_takes_weight(q, k, v):
    scores = q @ k.mT
    return torch.cat([scores, torch.zeros(1, 2, 64, 1)], -1).softmax(-1)[..., :-1] @ v


@near_miss("its scores are used by %mean too")
def scores_used_elsewhere(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.mean()


@near_miss("its weights are returned")
def weights_returned(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


@near_miss("its scores are returned")
def scores_returned(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores


@near_miss("%scores_1 writes to its scores in place")
def scores_scaled_in_place(q, k, v):
    scores = q @ k.mT
    scores *= SCALE
    return scores.softmax(-1) @ v


@near_miss("%mul_ writes to its scores in place")
def scores_written_beside(q, k, v):
    scores = q @ k.mT
    weights = scores.softmax(-1)
    scores.mul_(2)
    return weights @ v


@near_miss("%mul_ writes to q, k or v between its two products")
def keys_written_in_between(q, k, v):
    k = k * 1
    weights = (q @ k.mT).softmax(-1)
    k.mul_(2)
    return weights @ v + k


@near_miss("%mul_ writes to q, k or v between its two products")
def keys_written_behind_their_cast(q, k, v):
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    wide = k.float()
    k.mul_(2)
    return (q.float() @ wide.mT).softmax(-1).to(v.dtype) @ v + k


@near_miss("its keys may be [.., D, L]: no call moves the axes, and both are 64")
def keys_that_are_not_transposed(q, k, v):
    square = q @ q.mT
    return (square @ (k @ k.mT)).softmax(-1) @ v


@near_miss("its values may be [.., D, L]: no call moves the axes, and both are 64")
def values_in_another_layout_than_the_keys(q, k, v):
    square = k @ k.mT
    return (square @ square.mT).softmax(-1) @ square.mT


@near_miss("its weights are the right operand")
def weights_on_the_right(q, k, v):
    return (v.mT @ (q @ k.mT).softmax(-1)).mT


@near_miss("its softmax is in torch.bfloat16, narrower than its scores in torch.float32")
def softmax_in_a_narrower_dtype(q, k, v):
    return (q @ k.mT).bfloat16().softmax(-1).float() @ v


@near_miss("its scores change their axes in %scores")
def scores_with_keys_in_front(q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhkq", q, k)
    return scores.softmax(-1) @ v


@near_miss("window_size_left of flash_attn_func is 4")
def flash_attn_in_a_window(q, k, v):
    return swap(flash_attn_func(swap(q), swap(k), swap(v), window_size_left=4))


@near_miss("causal of flash_attn_func is True")
def flash_attn_causal(q, k, v):
    return swap(flash_attn_func(swap(q), swap(k), swap(v), causal=True))


@near_miss("dropout_p of flash_attn_func is 0.2")
def flash_attn_with_dropout(q, k, v):
    return swap(flash_attn_func(swap(q), swap(k), swap(v), 0.2))


@near_miss("flash_attn_varlen_func packs sequences of several lengths (cu_seqlens_q)")
def flash_attn_of_packed_sequences(q, k, v):
    lengths = torch.tensor([0, 32, 64], dtype=torch.int32)
    return swap(flash_attn_varlen_func(swap(q)[0], swap(k)[0], swap(v)[0], lengths)[None])


@near_miss("%lse reads another result than its output")
def flash_attn_whose_log_sum_exp_is_read(q, k, v):
    out, lse = flash_attn_forward(swap(q), swap(k), swap(v), 0.0, 0.3)
    return swap(out) * lse.mean()


@near_miss("score_mod %score_mod_0 changes its scores")
def flex_attention_with_a_score_function(q, k, v):
    return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + i - j)


@near_miss("it is causal")
def sdpa_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@near_miss("it has a mask [1, 2, 64, 64], which may differ between queries")
def sdpa_masked_by_data(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(q @ k.mT) > 0)
