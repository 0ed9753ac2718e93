"""Choose spatial memory by whole chunks, for models that cache keys a chunk at a time.

The latents of a chunk were denoised together and attended to each other before their keys were
stored, so what one shows is partly held by the keys of the others: a chunk is read whole or not
at all. Views of a chunk that another chosen one shows too are no waste here: reading a place from
several visits corrects what each of them has got wrong.

Chunks rank by the mean share of the new view that their latents show; of equal ones the earliest
is taken, because it has drifted least.
"""

from __future__ import annotations

from collections.abc import Sequence

from lipass.options import ContextOptions


def choose_chunks(
    overlap: Sequence[float],
    held: Sequence[int],
    taken: set[int],
    options: ContextOptions,
    history: int,
) -> dict[int, str]:
    """Give a reason for each latent outside sink and window; those chosen say "memory".

    Args:
        overlap: share of the new view, one a held latent.
        held: their indices into the history, ascending.
        taken: places in `held` of sink and window; what they leave of a chunk is a candidate.
        options: `memory_chunks`, `overlap_min` for a chunk's best latent, and `gain_min`, within
            which two chunks rank equal.
        history: latents of it; chunks are counted from its end, as the first may have another
            length.
    """
    chunks: dict[int, list[int]] = {}
    for place, index in enumerate(held):
        if place not in taken:
            chunk = (history - 1 - index) // options.chunk_latents
            chunks.setdefault(chunk, []).append(place)
    reasons, means = {}, {}
    for chunk, places in chunks.items():
        best = max(overlap[place] for place in places)
        means[chunk] = sum(overlap[place] for place in places) / len(places)
        if best < options.overlap_min:
            means.pop(chunk)
            below = f"dropped: overlap {best:.2f} < {options.overlap_min:.2f}"
            reasons.update(dict.fromkeys(places, below))
    assert options.memory_chunks is not None
    chosen = 0
    while means and chosen < options.memory_chunks:
        enough = max(means.values()) - options.gain_min
        chunk = next(chunk for chunk, mean in means.items() if mean >= enough)
        del means[chunk]
        chosen += 1
        reasons.update({place: f"memory {overlap[place]:.2f}" for place in chunks[chunk]})
    more = f"dropped: {chosen} memory chunks show more"
    for chunk in means:
        reasons.update(dict.fromkeys(chunks[chunk], more))
    return reasons
