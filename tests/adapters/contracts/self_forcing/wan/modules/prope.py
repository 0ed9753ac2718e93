"""Attention by cameras, in the releases that have it: features in fours, as points in space."""

import torch
from torch import nn


def prope_qkv(q, k, v, *, viewmats, Ks):
    """Move the features of tokens `[B, L, H, D]` into one space; the last result moves back."""
    lens = torch.zeros_like(viewmats)
    lens[..., :3, :3] = torch.diag_embed(torch.diagonal(Ks, dim1=-2, dim2=-1))
    lens[..., 3, 3] = 1.0
    onto = lens @ viewmats
    back = torch.linalg.inv(onto)
    return (
        *(_moved(x, m) for x, m in ((q, onto.mT), (k, back), (v, back))),
        lambda x: _moved(x, onto),
    )


def _moved(x, matrices):
    points = x.unflatten(3, (-1, 4))
    return torch.einsum("blij,blhpj->blhpi", matrices, points).flatten(3)


def add_prope_parameters(model):
    """Give each block what its second attention is projected by."""
    for block in model.blocks:
        dim = block.self_attn.o.out_features
        block.self_attn.prope_o = nn.Linear(dim, dim)
