"""Make models for `lipass inspect`, `diff`, `explain` and `bisect` to look at.

Run `lipass inspect examples/targets.py:worldplay_size`: 54 blocks, 2,048 wide, and no weights,
because lipass calls these functions with fake tensors.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEXT, CONTEXT, CHUNK, ROWS, COLUMNS = 512, 16, 4, 22, 40


class Block(nn.Module):
    """Attend to text, history and the chunk itself, then an MLP; a row of modulation a token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, rows: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Take tokens `[B, L, width]`, a row each, keys and values `[B, H, L, D]` behind them."""
        modulation = self.modulation(F.silu(rows))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        key, value = torch.cat([*keys, k], 2), torch.cat([*values, v], 2)
        attended = F.scaled_dot_product_attention(q, key, value).transpose(1, 2).flatten(2)
        x = x + gate * self.out(attended)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * self.down(F.gelu(self.up(h)))


class World(nn.Module):
    """Predict the velocity of the latents `[B, 16, T, Y, X]` of one chunk."""

    def __init__(self, blocks: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.level = nn.Linear(1, width)
        self.camera = nn.Linear(12, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.head = nn.Linear(width, 16)

    def forward(
        self, latents: Tensor, sigma: Tensor, w2c: Tensor, cache: list[tuple[Tensor, ...]]
    ) -> Tensor:
        """Take noise levels `[B, T]`, cameras `[B, context + T, 4, 4]` and keys and values."""
        b, _, t, y, x = latents.shape
        own = self.camera(w2c[:, -t:, :3].flatten(2))
        # one row a token, as released models have it; the hoist-rows pass makes it one a latent
        rows = (own + self.level(sigma[..., None])).repeat_interleave(y * x, 1)
        h = self.embed(latents.permute(0, 2, 3, 4, 1)).flatten(1, 3)
        for block, (text_k, text_v, k, v) in zip(self.blocks, cache, strict=True):
            h = block(h, rows, [text_k, k], [text_v, v])
        return self.head(h).view(b, t, y, x, 16).permute(0, 4, 1, 2, 3)


def worldplay_size(blocks: int = 54, width: int = 2048, heads: int = 16):
    """Return a decode call of HY-WorldPlay's size: 4 billion parameters, 17,600 keys."""
    model = World(blocks, width, heads)

    def pair(tokens: int) -> tuple[Tensor, Tensor]:
        made = (1, heads, tokens, width // heads)
        return torch.zeros(made), torch.zeros(made)

    history = CONTEXT * ROWS * COLUMNS
    cache = [(*pair(TEXT), *pair(history)) for _ in range(blocks)]
    cameras = torch.eye(4).repeat(1, CONTEXT + CHUNK, 1, 1)
    latents = torch.zeros(1, 16, CHUNK, ROWS, COLUMNS)
    return model, (latents, torch.zeros(1, CHUNK), cameras, cache)


def worldplay_depth_2():
    """Return the same call of two blocks, for a quick look."""
    return worldplay_size(blocks=2)


def tinyworld():
    """Return TinyWorld and two of its calls: the context is encoded, then a chunk is denoised."""
    model, context, noise, w2c, text = _tinyworld()
    clean, level = torch.zeros(1, CONTEXT), torch.full((1, CHUNK), 0.9)
    keys = torch.randn(1, 3, CONTEXT * 64, 64)
    history = [(keys, keys) for _ in model.blocks]
    return model, [(context, clean, w2c, text), (noise, level, w2c, text, history)]


def tinyworld_loop():
    """Return a function that holds TinyWorld's whole denoising loop, and its arguments."""
    from lipass.examples.tinyworld.rollout import SIGMAS, generate_chunk

    model, context, noise, w2c, text = _tinyworld()
    return generate_chunk, (model, noise, torch.tensor(SIGMAS), context, w2c, text)


def _tinyworld():
    from lipass.examples.tinyworld.model import TinyWorld

    model = TinyWorld().eval().requires_grad_(False)
    w2c = torch.eye(4).repeat(1, CONTEXT + CHUNK, 1, 1)
    w2c[0, :, 0, 3] = torch.linspace(0, 3, CONTEXT + CHUNK)
    text = model.text(torch.zeros(1, 32, dtype=torch.long))
    context, noise = torch.randn(1, 16, CONTEXT, 8, 8), torch.randn(1, 16, CHUNK, 8, 8)
    return model, context, noise, w2c, text
