"""The model: a chunked causal diffusion transformer with a camera, as a user would write it.

Plain PyTorch, shaped like HY-WorldPlay: `prefill` encodes the clean context latents once a chunk
into a KV cache, `decode` denoises the 4 latents of the chunk against [text | history | current].
Half of each head's dimensions carry the camera (PRoPE: attention sees relative projective
transforms), the other half 2D rotary positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .camera import FOCAL, plucker_rays

CHUNK_LATENTS = 4
TEXT_TOKENS = 32
VOCABULARY = ("", "a", "room", "in", "at", "day", "dusk", "night", "clear", "haze", "fog",
              "plain", "warm", "cool", "light", "air")  # fmt: skip

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the transformer; `rows` x `columns` tokens a latent frame."""

    rows: int = 8
    columns: int = 8
    latent_channels: int = 16
    width: int = 192
    heads: int = 3
    blocks: int = 6
    mlp_ratio: int = 4
    text_width: int = 64


SMALL = ModelConfig()
BASE = ModelConfig(rows=16, columns=16)


def tokenize(prompt: str) -> Tensor:
    """Turn a prompt of known words into token ids `[TEXT_TOKENS]`, padded with 0."""
    words = prompt.lower().replace(",", " ").split()
    unknown = [word for word in words if word not in VOCABULARY]
    if unknown:
        raise ValueError(f"a prompt uses the words {' '.join(VOCABULARY[1:])}, got {unknown[0]!r}")
    ids = [VOCABULARY.index(word) for word in words][:TEXT_TOKENS]
    return torch.tensor(ids + [0] * (TEXT_TOKENS - len(ids)))


def camera_transforms(w2c: Tensor) -> tuple[Tensor, Tensor]:
    """Projective maps `P` and `P^-1`, each `[B, F, 4, 4]`: scaled intrinsics times pose."""
    lift = torch.tensor([2 * FOCAL, 2 * FOCAL, 1.0, 1.0], device=w2c.device, dtype=w2c.dtype)
    rotation, shift = w2c[..., :3, :3], w2c[..., :3, 3:]
    back = rotation.transpose(-1, -2)
    bottom = torch.zeros_like(w2c[..., 3:, :])
    bottom[..., 3] = 1.0
    pose = torch.cat([torch.cat([rotation, 0.5 * shift], -1), bottom], -2)
    inverse = torch.cat([torch.cat([back, -0.5 * (back @ shift)], -1), bottom], -2)
    return lift[:, None] * pose, inverse / lift


class Rotary(nn.Module):
    """Rotary positions over the two spatial axes of a frame, in units of an 8x8 grid.

    They serve half of the grid too, whose tokens lie between four of the whole one.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, rows: int, columns: int, dims: int) -> None:
        super().__init__()
        frequency = 0.9 * 0.5 ** torch.arange(dims // 4)
        y = (torch.arange(rows) + 0.5) * 8 / rows
        x = (torch.arange(columns) + 0.5) * 8 / columns
        angle_y = (y[:, None, None] * frequency).expand(rows, columns, -1)
        angle_x = (x[None, :, None] * frequency).expand(rows, columns, -1)
        angle = torch.cat([angle_y, angle_x], -1).reshape(rows * columns, -1)
        self.grid = rows, columns
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate `[B, H, F, YX, dims]`."""
        cos, sin = self.cos, self.sin
        if x.shape[3] != len(cos):
            cos, sin = self.between_four()
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def between_four(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of half of the grid: the mean of four directions, of length 1."""
        rows, columns = self.grid
        grids = torch.stack([self.cos, self.sin]).unflatten(1, (rows // 2, 2, columns // 2, 2))
        mean = grids.mean((2, 4)).flatten(1, 2)
        cos, sin = (mean / mean.norm(dim=0)).unbind(0)
        return cos, sin


class Block(nn.Module):
    """One transformer block over frames of tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.heads = config.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.text_kv = nn.Linear(config.text_width, 2 * width)
        self.query_norm = nn.RMSNorm(width // config.heads)
        self.key_norm = nn.RMSNorm(width // config.heads)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def text(self, embedded: Tensor) -> KeyValue:
        """Keys and values `[B, H, TEXT_TOKENS, D]` of the prompt."""
        keys, values = self.text_kv(embedded).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.key_norm(keys).transpose(1, 2), values.transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        rows: Tensor,
        cameras: tuple[Tensor, Tensor],
        rotary: Rotary,
        text: KeyValue,
        history: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """Run on tokens `x [B, F, YX, width]` with modulation rows `[B, F, 6, width]`."""
        shape = self.modulated(rows)
        q, k, v = self.project(x, shape, cameras, rotary)
        parts = [text, (k, v)] if history is None else [text, history, (k, v)]
        keys = torch.cat([part[0] for part in parts], dim=2)
        values = torch.cat([part[1] for part in parts], dim=2)
        out = F.scaled_dot_product_attention(q, keys, values)
        return self.finish(x, out, shape, cameras), (k, v)

    def modulated(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the MLP, each `[B, F, 1, width]`."""
        return (rows + self.modulation)[:, :, None].unbind(3)

    def project(
        self, x: Tensor, shape: tuple[Tensor, ...], cameras: tuple[Tensor, Tensor], rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, H, F*YX, D]` of the tokens, with cameras and positions."""
        b, f, yx, width = x.shape
        shift, scale = shape[:2]
        h = F.layer_norm(x, (width,)) * (1 + scale) + shift
        qkv = self.qkv(h).view(b, f, yx, 3, self.heads, -1).permute(3, 0, 4, 1, 2, 5)
        q, k, v = qkv.unbind(0)
        q, k = self.query_norm(q), self.key_norm(k)
        p, p_inverse = cameras
        half = q.shape[-1] // 2
        q = torch.cat([transform(q[..., :half], p.mT), rotary(q[..., half:])], -1)
        k = torch.cat([transform(k[..., :half], p_inverse), rotary(k[..., half:])], -1)
        v = torch.cat([transform(v[..., :half], p_inverse), v[..., half:]], -1)
        return q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)

    def finish(
        self,
        x: Tensor,
        out: Tensor,
        shape: tuple[Tensor, ...],
        cameras: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Add what attention gave, `out [B, H, F*YX, D]`, then the MLP."""
        b, f, yx, width = x.shape
        gate, shift_mlp, scale_mlp, gate_mlp = shape[2:]
        out = out.unflatten(2, (f, yx))
        half = out.shape[-1] // 2
        out = torch.cat([transform(out[..., :half], cameras[0]), out[..., half:]], -1)
        out = out.permute(0, 2, 3, 1, 4).reshape(b, f, yx, width)
        x = x + gate * self.proj(out)
        h = F.layer_norm(x, (width,)) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * self.down(F.gelu(self.up(h), approximate="tanh"))


def transform(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply groups of four dimensions of `x [B, H, F, YX, D]` by `matrices [B, F, 4, 4]`."""
    groups = x.unflatten(-1, (-1, 4))
    return torch.einsum("bfij,bhfpgj->bhfpgi", matrices, groups).flatten(-2)


class TinyWorld(nn.Module):
    """Predict the velocity of a chunk of latents under a camera, or fill the KV cache."""

    def __init__(self, config: ModelConfig = SMALL) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embed = nn.Linear(config.latent_channels + 6, width)
        self.embed_walls = nn.Linear(config.latent_channels, width, bias=False)
        self.words = nn.Embedding(len(VOCABULARY), config.text_width)
        self.sigma_mlp = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.to_rows = nn.Linear(width, 6 * width)
        self.rotary = Rotary(config.rows, config.columns, width // config.heads // 2)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.head = nn.Linear(width, config.latent_channels)
        frequencies = torch.exp2(torch.linspace(-1, 6, 32))
        self.register_buffer("frequencies", frequencies, persistent=False)
        for block in self.blocks:
            nn.init.zeros_(block.proj.weight)
            nn.init.zeros_(block.down.weight)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.embed_walls.weight)

    def text(self, tokens: Tensor) -> list[KeyValue]:
        """Encode prompts `[B, TEXT_TOKENS]` into one (k, v) a block; once per prompt."""
        embedded = self.words(tokens)
        return [block.text(embedded) for block in self.blocks]

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        w2c: Tensor,
        text: list[KeyValue],
        history: list[KeyValue] | None = None,
        walls: Tensor | None = None,
    ) -> Tensor | list[KeyValue]:
        """Prefill (no history) or decode (with history).

        Args:
            latents: `[B, C, F, Y, X]`; the `n` clean context latents, or the 4 being denoised,
                which may be on half of the grid.
            sigma: noise level `[B, F]` of each latent in 0..1.
            w2c: `[B, n + 4, 4, 4]`, cameras of the context, then of the chunk, all relative to
                the chunk's first view.
            text: one (k, v) `[B, H, TEXT_TOKENS, D]` a block, from `text`.
            history: one (k, v) `[B, H, n*Y*X, D]` a block, from a prefill.
            walls: what the same views as those of `latents` would show of the unfurnished and
                unpainted room, encoded alike. None and zeros do not tell the plan.

        Returns:
            Prefill: the history, one (k, v) a block. Decode: velocity `[B, C, 4, Y, X]`.
        """
        n = w2c.shape[1] - CHUNK_LATENTS
        own = w2c[:, :n] if history is None else w2c[:, n:]
        x = self.tokens(latents, own, walls)
        rows = self.rows(sigma, x.dtype)
        cameras = tuple(matrices.to(x.dtype) for matrices in camera_transforms(own))
        cache = []
        for i, block in enumerate(self.blocks):
            past = None if history is None else history[i]
            x, key_value = block(x, rows, cameras, self.rotary, text[i], past)
            cache.append(key_value)
        if history is None:
            return cache
        return self.velocity(x, latents, sigma)

    def tokens(self, latents: Tensor, w2c: Tensor, walls: Tensor | None) -> Tensor:
        """Embed latents `[B, C, F, Y, X]`, their rays and what they show of the bare room."""
        rays = plucker_rays(w2c, latents.shape[3], latents.shape[4])
        rays = rays.flatten(2, 3).to(latents.dtype)
        x = self.embed(torch.cat([latents.permute(0, 2, 3, 4, 1).flatten(2, 3), rays], -1))
        if walls is not None:
            x = x + self.embed_walls(walls.permute(0, 2, 3, 4, 1).flatten(2, 3))
        return x

    def rows(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """Modulation rows `[B, F, 6, width]` of noise levels `[B, F]`."""
        angles = (sigma[..., None] * self.frequencies).float()
        rows = self.sigma_mlp(torch.cat([angles.sin(), angles.cos()], -1).to(dtype))
        return self.to_rows(F.silu(rows)).unflatten(-1, (6, -1))

    def velocity(self, x: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """Velocity `[B, C, F, Y, X]` from the last tokens: the model predicts clean latents."""
        clean = self.head(F.layer_norm(x, (x.shape[-1],)))
        clean = clean.unflatten(2, (latents.shape[3], latents.shape[4])).permute(0, 4, 1, 2, 3)
        return (latents - clean) / sigma[:, None, :, None, None]
