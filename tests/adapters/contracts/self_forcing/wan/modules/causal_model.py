"""A transformer over blocks of latents that writes its keys to a rolled cache in place."""

import math

import torch
from torch import nn
from wan.modules.attention import attention
from wan.modules.model import CrossAttention, RMSNorm, rope_params, sinusoidal
from wan.modules.prope import prope_qkv


def causal_rope_apply(x, grid_sizes, freqs, start_frame=0):
    """Turn the tokens of each sample by their place; `grid_sizes` is a tensor `[B, 3]`."""
    heads, half = x.size(2), x.size(3) // 2
    parts = freqs.split([half - 2 * (half // 3), half // 3, half // 3], dim=1)
    turned = []
    for i, (f, h, w) in enumerate(grid_sizes.tolist()):
        count = f * h * w
        own = torch.view_as_complex(x[i, :count].double().reshape(count, heads, -1, 2))
        along = (parts[0][start_frame : start_frame + f], parts[1][:h], parts[2][:w])
        views = zip(along, ((f, 1, 1, -1), (1, h, 1, -1), (1, 1, w, -1)), strict=True)
        table = torch.cat([one.view(shape).expand(f, h, w, -1) for one, shape in views], -1)
        own = torch.view_as_real(own * table.reshape(count, 1, -1)).flatten(2)
        turned.append(torch.cat([own, x[i, count:]]))
    return torch.stack(turned).type_as(x)


class CausalSelfAttention(nn.Module):
    """Attend to what a cache holds and to the block itself."""

    def __init__(self, dim, num_heads, local_attn_size, sink_size):
        super().__init__()
        self.num_heads, self.local_attn_size, self.sink_size = (
            num_heads,
            local_attn_size,
            sink_size,
        )
        self.max_attention_size = 32760 if local_attn_size == -1 else local_attn_size * 1560
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(
        self, x, grid_sizes, freqs, kv_cache, current_start, viewmats=None, Ks=None,
        prope_kv_cache=None,
    ):  # fmt: skip
        """Attend from places, and where cameras are given from these too."""
        q, k, v = (
            y.unflatten(2, (self.num_heads, -1))
            for y in (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x))
        )
        frame = math.prod(grid_sizes[0][1:]).item()
        roped_q, roped_k = (
            causal_rope_apply(y, grid_sizes, freqs, start_frame=current_start // frame).type_as(v)
            for y in (q, k)
        )
        out = self.read(roped_q, roped_k, v, kv_cache, current_start, frame)
        x = self.o(out.flatten(2))
        if viewmats is None or prope_kv_cache is None or not hasattr(self, "prope_o"):
            return x
        q, k, v, apply_fn_o = prope_qkv(q, k, v, viewmats=viewmats, Ks=Ks)
        out = apply_fn_o(self.read(q, k, v, prope_kv_cache, current_start, frame))
        return x + self.prope_o(out.flatten(2))

    def read(self, q, k, v, kv_cache, current_start, frame):
        """Roll a cache if it is full, write to its end, and attend to it."""
        new, size, sink = q.shape[1], kv_cache["k"].shape[1], self.sink_size * frame
        current_end = current_start + new
        before = kv_cache["local_end_index"].item()
        over = new + before - size
        is_new = current_end > kv_cache["global_end_index"].item()
        if self.local_attn_size != -1 and is_new and over > 0:
            rolled = before - over - sink
            for name in ("k", "v"):
                kv_cache[name][:, sink : sink + rolled] = kv_cache[name][
                    :, sink + over : sink + over + rolled
                ].clone()
            before = before - over
        end = before + current_end - kv_cache["global_end_index"].item()
        kv_cache["k"][:, end - new : end] = k
        kv_cache["v"][:, end - new : end] = v
        first = max(0, end - self.max_attention_size)
        out = attention(q, kv_cache["k"][:, first:end], kv_cache["v"][:, first:end])
        kv_cache["global_end_index"].fill_(current_end)
        kv_cache["local_end_index"].fill_(end)
        return out


class CausalBlock(nn.Module):
    """One layer, modulated frame by frame."""

    def __init__(self, dim, ffn_dim, num_heads, local_attn_size, sink_size):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (
            nn.LayerNorm(dim, elementwise_affine=affine) for affine in (False, False, True)
        )
        self.self_attn = CausalSelfAttention(dim, num_heads, local_attn_size, sink_size)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x, e, context, kv_cache, crossattn_cache, current_start, grid_sizes, freqs, **cameras
    ):
        """Attend to the cache, to the prompt, and pass each token on."""
        e = (self.modulation.unsqueeze(1) + e).chunk(6, dim=2)
        frames = (e[0].shape[1], x.shape[1] // e[0].shape[1])

        def framewise(y, scale, shift=None):
            y = y.unflatten(1, frames)
            return (y * scale if shift is None else y * (1 + scale) + shift).flatten(1, 2)

        y = framewise(self.norm1(x), e[1], e[0])
        y = self.self_attn(y, grid_sizes, freqs, kv_cache, current_start, **cameras)
        x = x + framewise(y, e[2])
        x = x + self.cross_attn(self.norm3(x), context, None, crossattn_cache)
        return x + framewise(self.ffn(framewise(self.norm2(x), e[4], e[3])), e[5])


class CausalWanModel(nn.Module):
    """The transformer."""

    def __init__(
        self, in_dim, out_dim, dim, ffn_dim, freq_dim, text_dim, text_len, num_heads, num_layers,
        local_attn_size=-1, sink_size=0, patch_size=(1, 2, 2),
    ):  # fmt: skip
        super().__init__()
        self.dim, self.out_dim, self.num_heads = dim, out_dim, num_heads
        self.freq_dim, self.text_len, self.patch_size = freq_dim, text_len, patch_size
        self.local_attn_size = local_attn_size
        self.patch_embedding = nn.Conv3d(in_dim, dim, patch_size, patch_size)
        self.text_embedding = nn.Linear(text_dim, dim)
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU())
        self.time_projection = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(
            CausalBlock(dim, ffn_dim, num_heads, local_attn_size, sink_size)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.head = nn.Linear(dim, out_dim * math.prod(patch_size))
        turn = dim // num_heads
        sizes = (turn - 4 * (turn // 6), 2 * (turn // 6), 2 * (turn // 6))
        self.freqs = torch.cat([rope_params(1024, size) for size in sizes], dim=1)

    def forward(
        self, x, t, context, seq_len, kv_cache=None, crossattn_cache=None, current_start=0,
        cache_start=0, viewmats=None, Ks=None, prope_kv_cache=None,
    ):  # fmt: skip
        """Predict the velocity of `[B, C, T, Y, X]` latents at levels `[B, T]`."""
        x = [self.patch_embedding(u.unsqueeze(0)) for u in x]
        grid_sizes = torch.stack([torch.tensor(u.shape[2:], dtype=torch.long) for u in x])
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = torch.tensor([u.size(1) for u in x], dtype=torch.long)
        assert seq_lens.max() <= seq_len
        x = torch.cat(x)
        e = self.time_embedding(sinusoidal(self.freq_dim, t.flatten()).type_as(x))
        e = self.time_projection(e).unflatten(1, (6, self.dim)).unflatten(0, t.shape)
        padded = [torch.cat([u, u.new_zeros(self.text_len - len(u), u.size(1))]) for u in context]
        context = self.text_embedding(torch.stack(padded))
        cameras = {"viewmats": None, "Ks": None}
        if viewmats is not None:
            f, h, w = grid_sizes.tolist()[0]
            each = (one[:, :f, None].expand(-1, -1, h * w, -1, -1) for one in (viewmats, Ks))
            cameras = dict(zip(cameras, (one.flatten(1, 2) for one in each), strict=True))
        for i, block in enumerate(self.blocks):
            own = (kv_cache[i], crossattn_cache[i], current_start)
            second = None if prope_kv_cache is None else prope_kv_cache[i]
            x = block(
                x, e, context, *own, grid_sizes=grid_sizes, freqs=self.freqs, **cameras,
                prope_kv_cache=second,
            )  # fmt: skip
        return torch.stack(self.unpatchify(self.head(self.norm(x)), grid_sizes))

    def unpatchify(self, x, grid_sizes):
        """Put the patches of each sample back, `[C, T, Y, X]`."""
        out = []
        for u, grid in zip(x, grid_sizes.tolist(), strict=True):
            u = u[: math.prod(grid)].view(*grid, *self.patch_size, self.out_dim)
            u = u.permute(6, 0, 3, 1, 4, 2, 5)
            sizes = [n * p for n, p in zip(grid, self.patch_size, strict=True)]
            out.append(u.reshape(self.out_dim, *sizes))
        return out
