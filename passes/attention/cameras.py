"""Recognise inputs that hold cameras, and the keys that they belong to."""

from __future__ import annotations

import torch
import torch.fx
from torch.fx import Node

from lipass.passes.attention.site import Grid
from lipass.passes.graph.compat import Size, divides, holds_now, is_parameter, known_true, value


def is_matrices(node: Node) -> bool:
    """Whether a node is an input `[B, F, 4, 4]` of floats and no parameter."""
    tensor = value(node)
    return (
        node.op == "placeholder"
        and isinstance(tensor, torch.Tensor)
        and tensor.dim() == 4
        and tensor.is_floating_point()
        and known_true(tensor.shape[2] == 4)
        and known_true(tensor.shape[3] == 4)
        and not is_parameter(node)
    )


def camera_of(key: Node, q_grid: Grid) -> str:
    """Name the input that has a camera for each latent of a piece and of q, or nothing."""
    tokens: Size = value(key).shape[2]
    per_latent = q_grid[1] * q_grid[2]
    if not holds_now(divides(per_latent, tokens)):
        return ""
    cameras = tokens // per_latent + q_grid[0]
    for node in key.graph.find_nodes(op="placeholder"):
        if is_matrices(node) and holds_now(value(node).shape[1] == cameras):
            return f"{node.name} has a camera for each of its latents"
    return ""
