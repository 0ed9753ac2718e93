"""Euler's rule over shifted noise levels; it counts its steps itself."""

import torch


class FlowMatchDiscreteScheduler:
    order = 1

    def __init__(self, shift=1.0):
        self.shift, self._step_index = shift, None

    @property
    def step_index(self):
        return self._step_index

    def set_timesteps(self, num_inference_steps, device=None):
        levels = torch.linspace(1, 0, num_inference_steps + 1)
        self.sigmas = self.shift * levels / (1 + (self.shift - 1) * levels)
        self.timesteps = self.sigmas[:-1] * 1000
        self.num_inference_steps, self._step_index = num_inference_steps, None

    def step(self, velocity, timestep, sample, return_dict=True):
        if self._step_index is None:
            self._step_index = int((self.timesteps == timestep).nonzero()[0])
        size = self.sigmas[self._step_index + 1] - self.sigmas[self._step_index]
        self._step_index += 1
        return (sample + velocity * size,)
