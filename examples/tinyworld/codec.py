"""The codec: a convolutional autoencoder between frames and latents, factor 8, 16 channels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT_CHANNELS = 16
FACTOR = 8


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class Codec(nn.Module):
    """Encode frames `[N, 3, 8Y, 8X]` in 0..1 to latents `[N, 16, Y, X]` of unit scale and back."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        wide = 80
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, width, 3, padding=1),
            _Residual(width),
            nn.Conv2d(width, wide, 2, stride=2),
            _Residual(wide),
            nn.Conv2d(wide, wide, 2, stride=2),
            _Residual(wide),
            _Residual(wide),
            nn.Conv2d(wide, LATENT_CHANNELS, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, wide, 3, padding=1),
            _Residual(wide),
            _Residual(wide),
            nn.Conv2d(wide, 4 * wide, 1),
            nn.PixelShuffle(2),
            _Residual(wide),
            nn.Conv2d(wide, 4 * width, 1),
            nn.PixelShuffle(2),
            _Residual(width),
            nn.Conv2d(width, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("latent_mean", torch.zeros(LATENT_CHANNELS))
        self.register_buffer("latent_std", torch.ones(LATENT_CHANNELS))

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames to normalised latents."""
        latents = self.encoder(frames - 0.5)
        return (latents - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents to frames in 0..1."""
        raw = latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        return (self.decoder(raw) + 0.5).clamp(0, 1)
