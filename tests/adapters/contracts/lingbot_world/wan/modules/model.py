"""One clip in one sequence: its latents attend to each other, rays and a prompt beside them."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .attention import flash_attention


def rope_params(length, dim):
    angles = torch.outer(torch.arange(length), 1e4 ** -(torch.arange(0, dim, 2).double() / dim))
    return torch.polar(torch.ones_like(angles), angles)


def rope_apply(x, grid_sizes, freqs):
    """Turn `[B, L, H, D]` by the places of its grid, in double precision; rows behind it stay."""
    heads, half = x.size(2), x.size(3) // 2
    parts, turned = freqs.split([half - 2 * (half // 3), half // 3, half // 3], dim=1), []
    for i, sizes in enumerate(grid_sizes.tolist()):
        count = math.prod(sizes)
        own = torch.view_as_complex(x[i, :count].double().reshape(count, heads, -1, 2))
        axes = []
        for axis, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            shape = [1, 1, 1, -1]
            shape[axis] = size
            axes.append(part[:size].view(shape).expand(*sizes, -1))
        own = torch.view_as_real(own * torch.cat(axes, -1).reshape(count, 1, -1)).flatten(2)
        turned.append(torch.cat([own, x[i, count:]]))
    return torch.stack(turned).float()


class SelfAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, seq_lens, grid_sizes, freqs):
        q, k, v = (f(x).unflatten(2, (self.num_heads, -1)) for f in (self.q, self.k, self.v))
        q, k = (rope_apply(one, grid_sizes, freqs) for one in (q, k))
        return self.o(flash_attention(q=q, k=k, v=v, k_lens=seq_lens).flatten(2))


class CrossAttention(SelfAttention):
    def forward(self, x, context, context_lens):
        q = self.q(x).unflatten(2, (self.num_heads, -1))
        k, v = (f(context).unflatten(2, (self.num_heads, -1)) for f in (self.k, self.v))
        return self.o(flash_attention(q, k, v, k_lens=context_lens).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, ffn_dim, num_heads):
        super().__init__()
        self.self_attn, self.cross_attn = (
            SelfAttention(dim, num_heads),
            CrossAttention(dim, num_heads),
        )
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.cam_injector, self.cam_scale, self.cam_shift = (nn.Linear(dim, dim) for _ in range(3))

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, dit_cond_dict=None
    ):
        assert e.dtype == torch.float32
        with torch.amp.autocast("cuda", dtype=torch.float32):
            e = [one.squeeze(2) for one in (self.modulation.unsqueeze(0) + e).chunk(6, dim=2)]
        y = self.self_attn(self.norm(x) * (1 + e[1]) + e[0], seq_lens, grid_sizes, freqs)
        x = x + y * e[2]
        if dit_cond_dict is not None and "c2ws_plucker_emb" in dit_cond_dict:
            rays = dit_cond_dict["c2ws_plucker_emb"]
            rays = rays + self.cam_injector(F.silu(rays))
            x = (1 + self.cam_scale(rays)) * x + self.cam_shift(rays)
        x = x + self.cross_attn(self.norm(x), context, context_lens)
        return x + self.ffn(self.norm(x) * (1 + e[4]) + e[3]) * e[5]


class WanModel(nn.Module):
    def __init__(
        self, model_type, patch_size, text_len, in_dim, dim, ffn_dim, freq_dim, text_dim, out_dim,
        num_heads, num_layers,
    ):  # fmt: skip
        super().__init__()
        self.patch_size, self.text_len, self.out_dim = patch_size, text_len, out_dim
        self.model_type, self.freq_dim, self.dim = model_type, freq_dim, dim
        self.patch_embedding = nn.Conv3d(in_dim, dim, patch_size, patch_size)
        self.patch_embedding_wancamctrl = nn.Linear(6 * 64 * math.prod(patch_size), dim)
        self.text_embedding = nn.Linear(text_dim, dim)
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU())
        self.time_projection = nn.Linear(dim, dim * 6)
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, num_heads) for _ in range(num_layers))
        self.head = nn.Linear(dim, math.prod(patch_size) * out_dim)
        d = dim // num_heads
        self.freqs = torch.cat(
            [rope_params(1024, n) for n in (d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6))], dim=1
        )

    def forward(self, x, t, context, seq_len, y=None, dit_cond_dict=None):
        """Predict the velocity of lists of `[C, T, Y, X]` latents, of one level each."""
        if y is not None:
            x = [torch.cat([u, v], dim=0) for u, v in zip(x, y, strict=True)]
        x = [self.patch_embedding(u.unsqueeze(0)) for u in x]
        grid_sizes = torch.stack([torch.tensor(u.shape[2:], dtype=torch.long) for u in x])
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = torch.tensor([u.size(1) for u in x], dtype=torch.long)
        assert seq_lens.max() <= seq_len
        x = torch.cat(
            [torch.cat([u, u.new_zeros(1, seq_len - u.size(1), u.size(2))], dim=1) for u in x]
        )
        if t.dim() == 1:
            t = t.expand(t.size(0), seq_len)
        e = self.time_embedding(sinusoid(t.flatten(), self.freq_dim).unflatten(0, (-1, seq_len)))
        e = self.time_projection(e).unflatten(2, (6, self.dim))
        padded = [torch.cat([u, u.new_zeros(self.text_len - len(u), u.size(1))]) for u in context]
        context = self.text_embedding(torch.stack(padded))
        if dit_cond_dict is not None and "c2ws_plucker_emb" in dit_cond_dict:
            rays = torch.cat([self._patches(one) for one in dit_cond_dict["c2ws_plucker_emb"]], 1)
            rays = self.patch_embedding_wancamctrl(rays)
            dit_cond_dict = {**dit_cond_dict, "c2ws_plucker_emb": rays}
        beside = {
            "e": e, "seq_lens": seq_lens, "grid_sizes": grid_sizes, "freqs": self.freqs,
            "context": context, "context_lens": None, "dit_cond_dict": dit_cond_dict,
        }  # fmt: skip
        for block in self.blocks:
            x = block(x, **beside)
        return [u.float() for u in self.unpatchify(self.head(x), grid_sizes)]

    def _patches(self, rays):
        pt, ph, pw = self.patch_size
        rays = rays.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
        return rays.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def unpatchify(self, x, grid_sizes):
        out = []
        for u, v in zip(x, grid_sizes.tolist(), strict=True):
            u = u[: math.prod(v)].view(*v, *self.patch_size, self.out_dim)
            u = torch.einsum("fhwpqrc->cfphqwr", u)
            sizes = [i * j for i, j in zip(v, self.patch_size, strict=True)]
            out.append(u.reshape(self.out_dim, *sizes))
        return out


def sinusoid(t, dim):
    angles = torch.outer(t.double(), 1e4 ** -(torch.arange(dim // 2).double() / (dim // 2)))
    return torch.cat([angles.cos(), angles.sin()], 1).float()
