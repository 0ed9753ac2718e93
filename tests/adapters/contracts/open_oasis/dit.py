"""Predict the velocity of each frame of a window, all levels of noise given frame by frame."""

import torch
import torch.nn.functional as F
from attention import SpatialAxialAttention, TemporalAxialAttention
from einops import rearrange
from rotary_embedding_torch import RotaryEmbedding
from torch import nn


def modulate(x, shift, scale):
    return x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x):
        return rearrange(self.proj(x), "B C H W -> B H W C")


class SpatioTemporalDiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads, mlp_ratio, spatial, temporal):
        super().__init__()
        sizes = {"heads": num_heads, "dim_head": hidden_size // num_heads}
        wide = int(mlp_ratio * hidden_size)
        self.s_attn = SpatialAxialAttention(hidden_size, rotary_emb=spatial, **sizes)
        self.t_attn = TemporalAxialAttention(hidden_size, rotary_emb=temporal, **sizes)
        self.s_mlp, self.t_mlp = (
            nn.Sequential(nn.Linear(hidden_size, wide), nn.GELU(), nn.Linear(wide, hidden_size))
            for _ in range(2)
        )
        self.s_adaLN_modulation, self.t_adaLN_modulation = (
            nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size)) for _ in range(2)
        )

    def forward(self, x, c):
        for attend, mlp, levels in (
            (self.s_attn, self.s_mlp, self.s_adaLN_modulation(c)),
            (self.t_attn, self.t_mlp, self.t_adaLN_modulation(c)),
        ):
            a, b, gate, d, e, last = levels.chunk(6, dim=-1)
            own = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            x = x + gate[:, :, None, None] * attend(modulate(own, a, b))
            own = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            x = x + last[:, :, None, None] * mlp(modulate(own, d, e))
        return x


class DiT(nn.Module):
    def __init__(
        self, input_h=18, input_w=32, patch_size=2, in_channels=16, hidden_size=1024, depth=12,
        num_heads=16, mlp_ratio=4.0, external_cond_dim=25, max_frames=32,
    ):  # fmt: skip
        super().__init__()
        self.max_frames, self.out_channels = max_frames, in_channels
        dim = hidden_size // num_heads
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = nn.Linear(16, hidden_size)
        self.external_cond = nn.Linear(external_cond_dim, hidden_size)
        self.spatial_rotary_emb = RotaryEmbedding(dim // 2, freqs_for="pixel", max_freq=256)
        self.temporal_rotary_emb = RotaryEmbedding(dim)
        rotary = self.spatial_rotary_emb, self.temporal_rotary_emb
        self.blocks = nn.ModuleList(
            SpatioTemporalDiTBlock(hidden_size, num_heads, mlp_ratio, *rotary)
            for _ in range(depth)
        )
        self.final_layer = nn.Linear(hidden_size, patch_size**2 * in_channels)

    def forward(self, x, t, external_cond=None):
        """Take `[B, T, C, H, W]`, levels `[B, T]` and actions `[B, T, A]`."""
        T = x.shape[1]
        x = self.x_embedder(rearrange(x, "b t c h w -> (b t) c h w"))
        x = rearrange(x, "(b t) h w d -> b t h w d", t=T)
        level = rearrange(t, "b t -> (b t)")[:, None].float() * torch.arange(1, 17) / 1000
        c = rearrange(self.t_embedder(level.cos()), "(b t) d -> b t d", t=T)
        if torch.is_tensor(external_cond):
            c = c + self.external_cond(external_cond)
        for block in self.blocks:
            x = block(x, c)
        x = rearrange(self.final_layer(x), "b t h w d -> (b t) h w d")
        p, C = self.x_embedder.patch_size[0], self.out_channels
        x = rearrange(x, "n h w (p q c) -> n c (h p) (w q)", p=p, q=p, c=C)
        return rearrange(x, "(b t) c h w -> b t c h w", t=T)
