"""Another sampler, which is told its levels."""

from .fm_solvers_unipc import FlowUniPCMultistepScheduler


class FlowDPMSolverMultistepScheduler(FlowUniPCMultistepScheduler):
    """The same rule, in the miniature."""


def get_sampling_sigmas(sampling_steps, shift):
    levels = [1 - i / sampling_steps for i in range(sampling_steps)]
    return [shift * one / (1 + (shift - 1) * one) for one in levels]


def retrieve_timesteps(scheduler, device=None, sigmas=None):
    scheduler.set_timesteps(sigmas=sigmas, device=device)
    return scheduler.timesteps, len(scheduler.timesteps)
