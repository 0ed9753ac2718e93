"""What the sampler sees of the transformer: predictions of clean latents."""

import torch
from torch import nn


class FlowMatchScheduler:
    """Shifted levels, and noise at the nearest of them."""

    def __init__(self, shift, sigma_min, extra_one_step):
        self.shift, self.sigma_min = shift, sigma_min

    def set_timesteps(self, count, training=False):
        """Space the levels evenly before they are shifted."""
        plain = torch.linspace(1.0, self.sigma_min, count + 1)[:-1]
        self.sigmas = self.shift * plain / (1 + (self.shift - 1) * plain)
        self.timesteps = 1000 * self.sigmas

    def sigma_at(self, timestep):
        """Return the level of the nearest timestep, `[N, 1, 1, 1]`."""
        nearest = (self.timesteps[None] - timestep[:, None]).abs().argmin(1)
        return self.sigmas[nearest].reshape(-1, 1, 1, 1)

    def add_noise(self, clean, noise, timestep):
        """Mix clean latents `[N, C, Y, X]` with noise."""
        sigma = self.sigma_at(timestep)
        return ((1 - sigma) * clean + sigma * noise).type_as(noise)


class WanDiffusionWrapper(nn.Module):
    """Holds a transformer and its scheduler; the constructor would load weights."""

    def post_init(self):
        """Have nothing to bind."""

    def get_scheduler(self):
        """Return what adds noise."""
        return self.scheduler

    def _convert_flow_pred_to_x0(self, flow_pred, xt, timestep):
        return xt - self.scheduler.sigma_at(timestep) * flow_pred

    def forward(
        self, noisy_image_or_video, conditional_dict, timestep, kv_cache=None,
        crossattn_cache=None, current_start=None, cache_start=None, **cameras,
    ):  # fmt: skip
        """Return velocity and clean latents `[B, T, C, Y, X]`."""
        flow = self.model(
            noisy_image_or_video.permute(0, 2, 1, 3, 4),
            t=timestep,
            context=conditional_dict["prompt_embeds"],
            seq_len=self.seq_len,
            kv_cache=kv_cache,
            crossattn_cache=crossattn_cache,
            current_start=current_start,
            cache_start=cache_start,
            **cameras,
        ).permute(0, 2, 1, 3, 4)
        clean = self._convert_flow_pred_to_x0(
            flow.flatten(0, 1), noisy_image_or_video.flatten(0, 1), timestep.flatten(0, 1)
        )
        return flow, clean.unflatten(0, flow.shape[:2])
