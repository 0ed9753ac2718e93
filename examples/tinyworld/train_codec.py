"""Train the codec on rendered frames of both resolutions, then its decoder, in a given time."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .codec import Codec

_LATENT_NOISE = 0.05
_PREDICTION_NOISE = 0.3
_CHECKPOINT_S = 60
# Frames of a step, by device, and how many of half the size take their place.
_BATCH = {"cpu": 16}
_BATCH_ON_DEVICE = 96
_SMALLER = 3

Progress = Callable[[int, float, float], None]


def train_codec(
    codec: Codec, frames: Tensor, held_out: Tensor, seconds: float, checkpoint: Path,
    progress: Progress,
) -> None:  # fmt: skip
    """Train `codec` for `seconds` on `frames [N, 3, 64, 64]` uint8; reports dB on `held_out`.

    A quarter of the batches are halved in size, since the world model starts on 32x32 frames.
    Noise of 0.05 standard deviations on the latents keeps the code smooth.
    """

    def loss_of(step: int, batch: Tensor, generator: torch.Generator) -> Tensor:
        if step % 4 == 3:
            batch = F.avg_pool2d(batch, 2)
        latents = codec.encode(batch)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        out = codec.decoder(latents + _LATENT_NOISE * latents.detach().std() * noise) + 0.5
        return F.mse_loss(out, batch) + 0.02 * F.l1_loss(out, batch)

    optimizer = torch.optim.AdamW(codec.parameters(), lr=1.0, weight_decay=1e-3, betas=(0.9, 0.99))
    generator = _train(
        codec, optimizer, frames, held_out, seconds, checkpoint, progress, loss_of,
        rate=1.2e-3, warm_up=100, seed=1, smaller=True,
    )  # fmt: skip
    with torch.no_grad():
        rows = torch.randperm(len(frames), generator=generator)[:2000]
        raw = torch.cat([codec.encode(_shown(codec, part)) for part in frames[rows].split(200)])
        codec.latent_mean.copy_(raw.mean((0, 2, 3)))
        codec.latent_std.copy_(raw.std((0, 2, 3)))


def refine_decoder(
    codec: Codec, frames: Tensor, held_out: Tensor, seconds: float, checkpoint: Path,
    progress: Progress,
) -> None:  # fmt: skip
    """Train the decoder alone on latents as wrong as the world model makes them.

    The encoder stays, so the world model stays valid. Each latent gets noise of 0 to 0.3 standard
    deviations, which is what a prediction after four steps is off by.
    """
    codec.requires_grad_(False)
    codec.decoder.requires_grad_(True)

    def loss_of(step: int, batch: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            latents = codec.encode(batch)
        level = _PREDICTION_NOISE * torch.rand(len(batch), 1, 1, 1, generator=generator)
        noisy = latents + (level * torch.randn(latents.shape, generator=generator)).to(latents)
        raw = noisy * codec.latent_std[:, None, None] + codec.latent_mean[:, None, None]
        return F.mse_loss(codec.decoder(raw) + 0.5, batch)

    optimizer = torch.optim.AdamW(codec.decoder.parameters(), lr=1.0, betas=(0.9, 0.99))
    _train(
        codec, optimizer, frames, held_out, seconds, checkpoint, progress, loss_of,
        rate=6e-4, warm_up=50, seed=2, smaller=False,
    )  # fmt: skip


def _train(
    codec: Codec, optimizer: torch.optim.Optimizer, frames: Tensor, held_out: Tensor,
    seconds: float, checkpoint: Path, progress: Progress, loss_of: Callable[..., Tensor], *,
    rate: float, warm_up: int, seed: int, smaller: bool,
) -> torch.Generator:  # fmt: skip
    """Take steps until `seconds` have passed over all runs; goes on from `checkpoint`."""
    device = codec.latent_mean.device
    step, elapsed_s = 0, 0.0
    if checkpoint.exists():
        # The optimizer moves what belongs on the device, and not its count of steps.
        state = torch.load(checkpoint, map_location="cpu")
        codec.load_state_dict(state["codec"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed_s = state["step"], state["elapsed_s"]
    generator = torch.Generator().manual_seed(seed + 1000 * step)
    begin = saved = time.perf_counter()
    before = elapsed_s
    while elapsed_s < seconds:
        left = 1 - elapsed_s / seconds
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm_up) * left
        count = _BATCH.get(device.type, _BATCH_ON_DEVICE)
        count *= _SMALLER if smaller and step % 4 == 3 else 1
        rows = torch.randint(len(frames), (count,), generator=generator)
        loss = loss_of(step, _shown(codec, frames[rows]), generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 0.1)
        optimizer.step()
        step += 1
        elapsed_s = before + time.perf_counter() - begin
        if time.perf_counter() - saved > _CHECKPOINT_S or elapsed_s >= seconds:
            saved = time.perf_counter()
            partial = checkpoint.with_suffix(".partial")
            state = {"codec": codec.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step, "elapsed_s": elapsed_s}, partial)
            partial.rename(checkpoint)
            progress(step, min(1.0, elapsed_s / seconds), measure(codec, held_out))
    return generator


def _shown(codec: Codec, frames: Tensor) -> Tensor:
    """Frames uint8 as the codec takes them, where it is."""
    return frames.to(codec.latent_mean.device).float() / 255


@torch.no_grad()
def measure(codec: Codec, frames: Tensor) -> float:
    """Reconstruction PSNR in dB over frames `[N, 3, P, P]` uint8."""
    errors = [
        F.mse_loss(codec.decode(codec.encode(batch)), batch) * len(batch)
        for batch in (_shown(codec, part) for part in frames.split(200))
    ]
    mean = torch.stack(errors).sum() / len(frames)
    return float(-10 * torch.log10(mean.clamp_min(1e-12)))
