"""A multistep sampler, which counts its steps and remembers predictions."""

import torch


class FlowUniPCMultistepScheduler:
    """Second order in the predictions of clean latents, first order at both ends."""

    def __init__(self):
        self.timesteps = self.sigmas = None
        self.step_index = None

    def set_timesteps(self, steps, device="cpu", shift=1.0):
        sigmas = torch.linspace(1, 0, steps + 1, device=device)
        self.sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        self.timesteps = self.sigmas[:-1] * 1000
        self.num_inference_steps, self.step_index, self._before = steps, None, None

    def step(self, model_output, timestep, sample, return_dict=True):
        at = (self.timesteps == timestep).nonzero()
        self.step_index = int(at[0]) if self.step_index is None else self.step_index
        now, following = self.sigmas[self.step_index : self.step_index + 2]
        clean = sample - now * model_output
        guess = clean
        if self._before is not None and following > 0:
            earlier, level = self._before
            guess = clean + (clean - earlier) * (now - following) / (2 * (level - now))
        self._before = (clean, now)
        self.step_index += 1
        return (guess + (sample - guess) * following / now,)
