"""The streaming model: chunk-causal, with a cache that nothing enters twice.

Plain PyTorch, shaped like Self-Forcing. Decoding denoises the 4 latents of a chunk against
[text | cached chunks | own chunk]; after the last step one forward on the clean latents, the
refresh, leaves the chunk's keys and values in the cache. They depend on nothing later: rays are
relative to the chunk's own first view, and where chunks stand to each other is in attention, which
sees relative projective transforms.

Two forms of the cache: grown by `cat`, or a ring of fixed size that is written in place.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .camera import FOCAL, relative_to
from .model import KeyValue, TinyWorld, camera_transforms, transform


def places_of_text(inverse: Tensor) -> Tensor:
    """Places of a prompt in chunks, of `P^-1 [B, F, 4, 4]` of the first views of these.

    Text has no place of its own; it stands where the chunk begins, wherever the world's origin is.
    """
    # Without the intrinsics: those are the queries'. A device would wait for a list of them.
    axis = torch.arange(4, device=inverse.device)
    return inverse * torch.where(axis < 2, 2 * FOCAL, 1.0)


def text_in_world(text: KeyValue, place: Tensor) -> KeyValue:
    """Put the keys and values of a prompt at a place `[B, 1, 4, 4]`."""
    back = place.to(text[0].dtype)
    half = text[0].shape[-1] // 2
    keys, values = (
        torch.cat([transform(t[:, :, None, :, :half], back)[:, :, 0], t[..., half:]], -1)
        for t in text
    )
    return keys, values


def with_chunk(cache: KeyValue, chunk: KeyValue, ring: tuple[int, int] | None) -> KeyValue:
    """Keys and values of the cache and the chunk; a ring is written in place."""
    if ring is None:
        return torch.cat([cache[0], chunk[0]], 2), torch.cat([cache[1], chunk[1]], 2)
    slot, filled = ring
    for stored, own in zip(cache, chunk, strict=True):
        stored[:, :, slot : slot + own.shape[2]] = own
    return cache[0][:, :, :filled], cache[1][:, :, :filled]


class StreamWorld(TinyWorld):
    """Predict the velocity of a chunk, or leave the keys and values of a clean one in the cache.

    Its weights have the names and shapes of `TinyWorld`.
    """

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        w2c: Tensor,
        text: list[KeyValue],
        cache: list[KeyValue] | None = None,
        walls: Tensor | None = None,
        *,
        ring: tuple[int, int] | None = None,
        refresh: bool = False,
    ) -> Tensor | list[KeyValue]:
        """Decode or refresh one chunk.

        Args:
            latents: `[B, C, 4, Y, X]` being denoised, or clean for a refresh.
            sigma: noise level `[B, 4]` of each latent in 0..1.
            w2c: cameras of the chunk `[B, 4, 4, 4]`, in any frame that all chunks share.
            text: one (k, v) `[B, H, TEXT_TOKENS, D]` a block, from `text`.
            cache: one (k, v) `[B, H, tokens, D]` a block. Grown: all chunks so far, None before
                the first. Of fixed size with `ring`.
            walls: what the chunk's views would show of the bare room, encoded alike, or None.
            ring: for a cache of fixed size: the token of it at which the chunk is written, in
                place, and how many of its tokens are attended to, the chunk's among them.
            refresh: leave the chunk in the cache.

        Returns:
            Decode: velocity `[B, C, 4, Y, X]`. Refresh: the cache with the chunk.
        """
        x = self.tokens(latents, relative_to(w2c, w2c[:, 0]), walls)
        rows = self.rows(sigma, x.dtype)
        transforms = camera_transforms(w2c)
        cameras = tuple(matrices.to(x.dtype) for matrices in transforms)
        place = places_of_text(transforms[1][:, :1])
        left = []
        for i, block in enumerate(self.blocks):
            shape = block.modulated(rows)
            q, k, v = block.project(x, shape, cameras, self.rotary)
            text_k, text_v = text_in_world(text[i], place)
            keys, values = (k, v) if cache is None else with_chunk(cache[i], (k, v), ring)
            out = F.scaled_dot_product_attention(
                q, torch.cat([text_k, keys], 2), torch.cat([text_v, values], 2)
            )
            x = block.finish(x, out, shape, cameras)
            left.append((keys, values) if cache is None or ring is None else cache[i])
        if refresh:
            return left
        return self.velocity(x, latents, sigma)
