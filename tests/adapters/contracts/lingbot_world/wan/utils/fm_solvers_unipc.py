"""A multistep sampler, which remembers predictions."""

import torch


class FlowUniPCMultistepScheduler:
    """Second order in the predictions of clean latents, first order at both ends."""

    def __init__(self, num_train_timesteps=1000, shift=1, use_dynamic_shifting=False):
        self.num_train_timesteps = num_train_timesteps

    def set_timesteps(self, steps=None, device="cpu", sigmas=None, shift=1.0):
        levels = (
            torch.linspace(1, 0, steps + 1) if sigmas is None else torch.tensor([*sigmas, 0.0])
        )
        self.sigmas = (shift * levels / (1 + (shift - 1) * levels)).to(device)
        self.timesteps = self.sigmas[:-1] * self.num_train_timesteps
        self._before = None

    def step(self, model_output, timestep, sample, return_dict=True, generator=None):
        at = int((self.timesteps == timestep).nonzero()[0])
        now, following = self.sigmas[at : at + 2]
        clean = guess = sample - now * model_output
        if self._before is not None and following > 0:
            earlier, level = self._before
            guess = clean + (clean - earlier) * (now - following) / (2 * (level - now))
        self._before = (clean, now)
        return (guess + (sample - guess) * following / now,)
