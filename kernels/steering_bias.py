"""Ask, in front of attention, what a session adds to the scores of a prompt and of old history.

Where a prompt changes, keys of two texts lie one behind the other and weigh what the session says;
what is said changes from chunk to chunk, and no shape of the graph with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipass.kernels import registry

_library = torch.library.Library("lipass", "FRAGMENT")
# A query is asked for that no two calls share: what is kept between calls, and what is taken out
# of a loop of steps, depends on inputs that stay, and the answer changes though they do.
_library.define(
    "steering_bias(Tensor q, SymInt[] tokens, str roles, SymInt per_latent, int latents=1)"
    " -> Tensor"
)


def _steering_bias(
    q: Tensor, tokens: list[int], roles: str, per_latent: int, latents: int = 1
) -> Tensor:
    """Say what is added to the score of each key, `[1, 1, latents, Lk]` in the dtype of q.

    `registry.answer("steering_bias", ..)` may say, from the same arguments; nothing is added
    where nobody does.

    Args:
        q: queries; only dtype and device are read.
        tokens: of each run of keys, in order.
        roles: of each run, comma separated: text, history, current.
        per_latent: tokens of one latent of the history.
        latents: of the queries, each of which gets a row; 1 gives all queries one.
    """
    if (known := registry.answer_of("steering_bias")) is not None:
        rows: Tensor | None = known(q, tuple(tokens), tuple(roles.split(",")), per_latent, latents)
        if rows is not None:
            return rows
    return q.new_zeros(1, 1, latents, sum(tokens))


def _steering_bias_fake(
    q: Tensor, tokens: list[int], roles: str, per_latent: int, latents: int = 1
) -> Tensor:
    return q.new_empty(1, 1, latents, sum(tokens))


_library.impl("steering_bias", _steering_bias, "CompositeExplicitAutograd")
torch.library.register_fake("lipass::steering_bias", _steering_bias_fake, lib=_library)
