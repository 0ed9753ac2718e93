"""One sequence of memory, past and new latents, padded, with a level for each token."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .action_module import ActionModule
from .attention import flash_attention


def rope_params(length, dim):
    angles = torch.outer(torch.arange(length), 1e4 ** -(torch.arange(0, dim, 2).double() / dim))
    return torch.polar(torch.ones_like(angles), angles)


def rope_apply_with_indices(x, grid_sizes, freqs, t_indices):
    """Turn `[B, L, H, D]` by the positions of its grid; rows behind it stay."""
    out, c = [], x.shape[3] // 2
    t_freqs, h_freqs, w_freqs = freqs.split([c - 2 * (c // 3), c // 3, c // 3], 1)
    for i, (f, h, w) in enumerate(grid_sizes.tolist()):
        if not torch.is_tensor(t_indices):
            t_indices = torch.tensor(t_indices, device=freqs.device)
        own = torch.view_as_complex(
            x[i, : f * h * w].float().reshape(f * h * w, x.shape[2], -1, 2)
        )
        angles = torch.cat(
            [
                t_freqs[t_indices].view(f, 1, 1, -1).expand(f, h, w, -1),
                h_freqs[:h].view(1, h, 1, -1).expand(f, h, w, -1),
                w_freqs[:w].view(1, 1, w, -1).expand(f, h, w, -1),
            ],
            -1,
        ).reshape(f * h * w, 1, -1)
        own = torch.view_as_real(own * angles.to(own.dtype)).flatten(2)
        out.append(torch.cat([own, x[i, f * h * w :]]))
    return torch.stack(out).float()


class SelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, seq_lens, grid_sizes, freqs, memory_length, memory_idx, predict_idx):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        if isinstance(predict_idx, tuple):
            predict_idx = list(range(*predict_idx))
        if memory_length > 0:
            places = grid_sizes[0][1] * grid_sizes[0][2]
            new, old = grid_sizes.clone(), grid_sizes.clone()
            new[:, 0] = new[:, 0] - memory_length
            old[:, 0] = memory_length
            parts = (
                (slice(None, memory_length * places), old, freqs, memory_idx),
                (slice(memory_length * places, None), new, freqs, predict_idx),
            )
            q, k = (
                torch.cat([rope_apply_with_indices(one[:, at], *rest) for at, *rest in parts], 1)
                for one in (q, k)
            )
        else:
            q, k = (rope_apply_with_indices(one, grid_sizes, freqs, predict_idx) for one in (q, k))
        return self.o(flash_attention(q=q, k=k, v=v, k_lens=seq_lens).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, context):
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = (f(context).unflatten(-1, (self.heads, -1)) for f in (self.k, self.v))
        return self.o(flash_attention(q, k, v, k_lens=None).flatten(2))


class WanAttentionBlock(nn.Module):
    def __init__(self, dim, ffn_dim, heads, actions, index):
        super().__init__()
        self.self_attn, self.cross_attn = SelfAttention(dim, heads), CrossAttention(dim, heads)
        self.action_model = ActionModule(**actions) if index in actions["blocks"] else None
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Parameter(torch.randn(1, 1, 6, dim) * 0.1)
        self.cam_injector, self.cam_scale, self.cam_shift = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, rays, actions, memory):
        e = (self.modulation + e).unbind(2)
        y = self.self_attn(self.norm(x) * (1 + e[1]) + e[0], seq_lens, grid_sizes, freqs, *memory)
        x = x + y * e[2]
        rays = rays + self.cam_injector(F.silu(rays))
        x = (1 + self.cam_scale(rays)) * x + self.cam_shift(rays)
        x = x + self.cross_attn(self.norm(x), context)
        if self.action_model is not None:
            valid = int(grid_sizes[0].prod().item())
            sizes = grid_sizes[0][0], grid_sizes[0][1], grid_sizes[0][2]
            own = self.action_model(x[:, :valid], *sizes, *actions)
            x = torch.cat([own, x[:, valid:]], 1) if valid < x.shape[1] else own
        return x + self.ffn(self.norm(x) * (1 + e[4]) + e[3]) * e[5]


class WanModel(nn.Module):
    def __init__(
        self,
        patch_size,
        text_len,
        in_dim,
        dim,
        ffn_dim,
        freq_dim,
        text_dim,
        out_dim,
        num_heads,
        num_layers,
        action_config,
        **others,
    ):
        super().__init__()
        self.patch_size, self.text_len, self.out_dim = patch_size, text_len, out_dim
        self.freq_dim, self.dim = freq_dim, dim
        self.patch_embedding = nn.Conv3d(in_dim, dim, patch_size, patch_size)
        self.patch_embedding_wancamctrl = nn.Linear(6 * 256 * math.prod(patch_size), dim)
        self.text_embedding = nn.Linear(text_dim, dim)
        self.time_embedding = nn.Linear(freq_dim, dim)
        self.time_projection = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(
            WanAttentionBlock(dim, ffn_dim, num_heads, action_config, i) for i in range(num_layers)
        )
        self.head = nn.Linear(dim, math.prod(patch_size) * out_dim)
        d = dim // num_heads
        self.freqs = torch.cat(
            [rope_params(256, n) for n in (d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6))], 1
        )

    def forward(
        self,
        x,
        t,
        context,
        seq_len,
        mouse_cond=None,
        keyboard_cond=None,
        x_memory=None,
        timestep_memory=None,
        mouse_cond_memory=None,
        keyboard_cond_memory=None,
        plucker_emb=None,
        memory_latent_idx=None,
        predict_latent_idx=None,
        fa_version=None,
    ):
        memory_length = 0
        if x_memory is not None:
            memory_length = x_memory.shape[2]
            x = torch.cat([x_memory, x], dim=2)
            t = torch.cat([timestep_memory, t], dim=1)
        x = [self.patch_embedding(u[None]) for u in x]
        padded = [torch.cat([u, u.new_zeros(self.text_len - len(u), u.shape[1])]) for u in context]
        context = self.text_embedding(torch.stack(padded))
        grid_sizes = torch.stack([torch.tensor(u.shape[2:], dtype=torch.long) for u in x])
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = torch.tensor([u.size(1) for u in x], dtype=torch.long)
        assert seq_lens.max() <= seq_len
        x = torch.cat([filled(u, seq_len) for u in x])
        t = filled(t[..., None], seq_len)[..., 0] if t.shape[1] < seq_len else t
        e = self.time_embedding(sinusoid(t.flatten(), self.freq_dim).unflatten(0, (1, seq_len)))
        e0 = self.time_projection(F.silu(e)).unflatten(2, (6, self.dim))
        pt, ph, pw = self.patch_size
        rays = plucker_emb.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
        rays = rays.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        rays = filled(rays, seq_len) if rays.shape[1] < seq_len else rays
        rays = self.patch_embedding_wancamctrl(rays)
        actions = mouse_cond, keyboard_cond, mouse_cond_memory, keyboard_cond_memory
        memory = memory_length, memory_latent_idx, predict_latent_idx
        for block in self.blocks:
            x = block(x, e0, seq_lens, grid_sizes, self.freqs, context, rays, actions, memory)
        x = self.unpatchify(self.head(x * (1 + e)), grid_sizes)
        return torch.stack([u[:, memory_length:] for u in x])

    def unpatchify(self, x, grid_sizes):
        out = []
        for u, v in zip(x, grid_sizes.tolist(), strict=True):
            u = u[: math.prod(v)].view(*v, *self.patch_size, self.out_dim)
            u = torch.einsum("fhwpqrc->cfphqwr", u)
            sizes = [i * j for i, j in zip(v, self.patch_size, strict=True)]
            out.append(u.reshape(self.out_dim, *sizes))
        return out


def filled(u, length):
    """Put rows of zeros behind `[1, L, C]`."""
    return torch.cat([u, u.new_zeros(1, length - u.size(1), u.size(2))], dim=1)


def sinusoid(t, dim):
    angles = torch.outer(t.double(), 1e4 ** -(torch.arange(dim // 2).double() / (dim // 2)))
    return torch.cat([angles.cos(), angles.sin()], 1).float()
