"""Mochi of diffusers: its attention takes the words of each prompt by `nonzero`, in a loop.

How many words are not padding is data, so Dynamo leaves the function to Python. Here padding is
masked instead: the same results, in one call that graphs show.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipass.adapters.adoption import Adoption
from lipass.adapters.families import Family

_PROCESSOR = "MochiAttnProcessor2_0"


class MaskedAttention:
    """Attend over latents and words, those of padding masked, for all samples at once."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return latents `[B, L, C]` and words `[B, W, C]`, words that are none last and zero."""
        order = torch.argsort(attention_mask.logical_not().int(), dim=1, stable=True)
        said = attention_mask.bool().gather(1, order)
        index = order[:, :, None].expand(-1, -1, encoder_hidden_states.shape[2])
        words = encoder_hidden_states.gather(1, index)
        of_latents = (attn.to_q, attn.to_k, attn.to_v)
        of_words = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms = (attn.norm_q, attn.norm_k, None), (attn.norm_added_q, attn.norm_added_k, None)
        joined: list[Tensor] = []
        for i in range(3):  # q, k, v
            parts: list[Tensor] = []
            for project, norm, tokens in (
                (of_latents[i], norms[0][i], hidden_states),
                (of_words[i], norms[1][i], words),
            ):
                heads = project(tokens).unflatten(2, (attn.heads, -1))
                parts.append(heads if norm is None else norm(heads))
            if image_rotary_emb is not None and i < 2:
                parts[0] = _turned(parts[0], *image_rotary_emb)
            joined.append(torch.cat(parts, 1).transpose(1, 2))
        length = hidden_states.shape[1]
        shown = F.pad(said, (length, 0), value=True)[:, None, None]
        q, k, v = joined
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=shown)
        out = out.transpose(1, 2).flatten(2)
        latents, text = out[:, :length], out[:, length:] * said[:, :, None]
        latents = attn.to_out[1](attn.to_out[0](latents))
        return latents, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of features `[B, L, H, D]` by angles `[L, H, D / 2]`, in fp32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = [(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)]
    return torch.stack(pairs, -1).flatten(-2)


def _adopt(model: nn.Module, adoption: Adoption) -> None:
    why = "masks padding; `nonzero` in a loop over the batch hid it"
    for part in model.modules():
        if adoption.hold(part, "processor", why):
            continue
        if type(getattr(part, "processor", None)).__name__ == _PROCESSOR:
            adoption.rebind(part, "processor", MaskedAttention(), why)


FAMILY = Family("mochi", ("transformer_mochi.MochiTransformer3DModel",), _adopt)
