"""Train the codec on rendered frames of both resolutions within a wall-clock budget."""

import time

import torch
from torch import Tensor
from torch.nn import functional as F

from .codec import Codec

_LATENT_NOISE = 0.05
_PREDICTION_NOISE = 0.3


def psnr_db(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two tensors in 0..1, by their mean squared error."""
    return float(-10 * torch.log10(F.mse_loss(x, y).clamp_min(1e-12)))


def train_codec(frames: Tensor, held_out: Tensor, seconds: float, progress) -> Codec:
    """Train for `seconds` on `frames [N, 3, 64, 64]` uint8; reports dB on `held_out`.

    A quarter of the batches are halved in size, since the world model starts on 32x32 frames.
    Noise of 0.05 standard deviations on the latents keeps the code smooth.
    """
    torch.manual_seed(0)
    codec = Codec()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=1.0, weight_decay=1e-3, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(1)
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / seconds) < 1:
        rate = 1.2e-3 * min(1.0, (step + 1) / 100) * (1 - done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        half = step % 4 == 3
        rows = torch.randint(len(frames), (48 if half else 16,), generator=generator)
        batch = frames[rows].float() / 255
        if half:
            batch = F.avg_pool2d(batch, 2)
        latents = codec.encode(batch)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = latents + _LATENT_NOISE * latents.detach().std() * noise
        out = codec.decoder(noisy) + 0.5
        loss = F.mse_loss(out, batch) + 0.02 * F.l1_loss(out, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 0.1)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            progress(step, done, measure(codec, held_out))
    with torch.no_grad():
        raw = codec.encode(frames[torch.randperm(len(frames), generator=generator)[:2000]] / 255.0)
        codec.latent_mean.copy_(raw.mean((0, 2, 3)))
        codec.latent_std.copy_(raw.std((0, 2, 3)))
    progress(step, 1.0, measure(codec, held_out))
    return codec


def refine_decoder(
    codec: Codec, frames: Tensor, held_out: Tensor, seconds: float, progress
) -> Codec:
    """Train the decoder alone on latents as wrong as the world model makes them.

    The encoder stays, so the world model stays valid. Each latent gets noise of 0 to 0.3 standard
    deviations, which is what a prediction after four steps is off by.
    """
    codec.requires_grad_(False)
    codec.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(codec.decoder.parameters(), lr=1.0, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(2)
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * min(1.0, (step + 1) / 50) * (1 - done)
        rows = torch.randint(len(frames), (16,), generator=generator)
        batch = frames[rows].float() / 255
        with torch.no_grad():
            latents = codec.encode(batch)
        level = _PREDICTION_NOISE * torch.rand(len(batch), 1, 1, 1, generator=generator)
        noisy = latents + level * torch.randn(latents.shape, generator=generator)
        raw = noisy * codec.latent_std[:, None, None] + codec.latent_mean[:, None, None]
        loss = F.mse_loss(codec.decoder(raw) + 0.5, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.decoder.parameters(), 0.1)
        optimizer.step()
        step += 1
        if step % 400 == 0:
            progress(step, done, measure(codec, held_out))
    progress(step, 1.0, measure(codec, held_out))
    return codec


@torch.no_grad()
def measure(codec: Codec, frames: Tensor) -> float:
    """Reconstruction PSNR in dB over frames `[N, 3, P, P]` uint8."""
    batch = frames.float() / 255
    return psnr_db(codec.decode(codec.encode(batch)), batch)
