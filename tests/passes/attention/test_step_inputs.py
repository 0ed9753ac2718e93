"""What a denoising step is given, where clean latents of a memory attend with the noisy ones."""

import torch
from torch import nn
from torch.nn import functional as F

from lipass.passes.attention.step_inputs import step_inputs

TEXT = "canonicalize,find-attention"


class WithMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.places = nn.Parameter(torch.randn(64, 8), requires_grad=False)

    def forward(self, x, t, memory, at):
        """`x` [1, 8, 2, 3, 4], one level a token `t` [1, 24], 3 frames of memory, 2 positions."""
        every = torch.cat([memory, x], 2)
        level = torch.cat([t.new_zeros(1, 36), t], 1)
        tokens = every.flatten(2).mT * level[..., None]
        tokens = tokens + self.places[at].sum(0)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return out.mT.unflatten(-1, every.shape[2:])[:, :, 3:]


def named(trace, apply, at):
    x, memory = torch.randn(1, 8, 2, 3, 4), torch.randn(1, 8, 3, 3, 4)
    gm = trace(WithMemory(), (x, torch.rand(1, 24), memory, at))
    apply(gm, TEXT)
    found = step_inputs(gm.graph)
    return {
        kind: {found.names[i] for i in getattr(found, kind)}
        for kind in ("latents", "levels", "conditions")
    }


def test_a_level_for_each_token_of_the_noisy_latents_is_one(trace, apply):
    kinds = named(trace, apply, torch.tensor([5, 6]))
    assert kinds == {"latents": {"x"}, "levels": {"t"}, "conditions": {"memory", "at"}}


def test_a_position_for_each_frame_is_no_level(trace, apply):
    kinds = named(trace, apply, torch.arange(5))  # as many as frames attend
    assert kinds["levels"] == {"t"}
