"""All chunks of a walk in one forward, as teacher forcing trains the streaming model.

Clean chunks pass once and give every chunk its history; noisy ones beside them attend to the clean
chunks before their own. It equals the stream chunk by chunk, at a fraction of the forwards.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .camera import relative_to
from .model import CHUNK_LATENTS, KeyValue, camera_transforms
from .stream import StreamWorld, places_of_text, text_in_world


def _of_own_view(w2c: Tensor) -> Tensor:
    """Cameras `[B, F, 4, 4]`, each relative to the first view of its chunk."""
    chunks = w2c.unflatten(1, (-1, CHUNK_LATENTS))
    return relative_to(chunks, chunks[:, :, 0]).flatten(1, 2)


def chunks_of(x: Tensor, shown: list[int], axis: int) -> Tensor:
    """Take chunks by slices; a device would wait for a list of their frames."""
    every = x.split(CHUNK_LATENTS, axis)
    return torch.cat([every[chunk] for chunk in shown], axis)


def forward_all(
    model: StreamWorld,
    clean: Tensor,
    level: Tensor,
    w2c: Tensor,
    text: list[KeyValue],
    walls: Tensor | None,
    noisy: Tensor | None = None,
    sigma: Tensor | None = None,
    targets: tuple[int, ...] = (),
    earlier_text: list[KeyValue] | None = None,
    changed_at: int = 0,
) -> tuple[Tensor | None, list[KeyValue]]:
    """Run a walk of `N` chunks, and noisy versions of the chunks `targets`.

    Args:
        model: the streaming model.
        clean: latents `[B, C, 4N, Y, X]`; of noise level `level [B, 4N]`.
        level: noise that clean latents carry and the model is told.
        w2c: cameras `[B, 4 * max(N, last target + 1), 4, 4]`.
        text: one (k, v) a block.
        walls: latents of the bare room along `w2c`, or None.
        noisy: `[B, C, 4J, Y, X]` at noise levels `sigma [B, 4J]`.
        sigma: noise levels of `noisy`.
        targets: which chunk each of the `J` noisy ones is.
        earlier_text: the prompt of chunks in front of chunk `changed_at`, alike.
        changed_at: from which chunk on `text` is the prompt.

    Returns:
        Velocity of `noisy`, and the cache after `N` chunks, one (k, v) a block.
    """
    count = clean.shape[2] // CHUNK_LATENTS
    shown = [*range(count), *targets]
    own = chunks_of(w2c, shown, 1)
    latents = clean if noisy is None else torch.cat([clean, noisy], 2)
    levels = level if sigma is None else torch.cat([level, sigma], 1)
    told = None if walls is None else chunks_of(walls, shown, 2)
    x = model.tokens(latents, _of_own_view(own), told)
    rows = model.rows(levels, x.dtype)
    transforms = camera_transforms(own)
    cameras = tuple(matrices.to(x.dtype) for matrices in transforms)
    places = places_of_text(transforms[1][:, ::CHUNK_LATENTS])
    tokens = CHUNK_LATENTS * x.shape[2]
    cache = []
    for i, block in enumerate(model.blocks):
        # Nobody reads what the last block makes of clean chunks: their keys and values are all.
        first = count if i == len(model.blocks) - 1 else 0
        shape = block.modulated(rows)
        q, k, v = block.project(x, shape, cameras, model.rotary)
        cache.append((k[:, :, : count * tokens], v[:, :, : count * tokens]))
        if first == len(shown):
            return None, cache
        out = []
        for position in range(first, len(shown)):
            here = slice(position * tokens, (position + 1) * tokens)
            past = slice(0, shown[position] * tokens)
            said = text
            if earlier_text is not None and shown[position] < changed_at:
                said = earlier_text
            text_k, text_v = text_in_world(said[i], places[:, position : position + 1])
            keys = torch.cat([text_k, k[:, :, past], k[:, :, here]], 2)
            values = torch.cat([text_v, v[:, :, past], v[:, :, here]], 2)
            out.append(F.scaled_dot_product_attention(q[:, :, here], keys, values))
        cut = slice(first * CHUNK_LATENTS, None)
        x = block.finish(
            x[:, cut], torch.cat(out, 2), tuple(part[:, cut] for part in shape),
            tuple(matrices[:, cut] for matrices in cameras),
        )  # fmt: skip
    return model.velocity(x, noisy, sigma), cache
