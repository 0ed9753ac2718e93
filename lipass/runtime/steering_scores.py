"""Tell attention what prompts and older history weigh in the chunk that is open."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lipass.errors import LipassError
from lipass.kernels import registry
from lipass.policy.blend import Blend
from lipass.policy.blending import text_tensors

if TYPE_CHECKING:
    from lipass.runtime.chunk import Chunk

_Layout = tuple[tuple[int, ...], tuple[str, ...], int, int, torch.dtype, torch.device]


class SteeringScores:
    """What is added to scores in the chunks of one session.

    Rows are a tensor of the session, written anew in the first call of each chunk, so that who
    records what runs on a device reads what holds now.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, _Layout], Tensor] = {}
        self._written: weakref.WeakKeyDictionary[Chunk, set[_Layout]] = weakref.WeakKeyDictionary()

    def answering(self, chunk: Chunk) -> contextlib.AbstractContextManager[object]:
        """Answer the calls inside for a chunk."""
        blend = chunk.plan.steering
        if blend is None or not blend.needs_attention:
            return contextlib.nullcontext()

        def rows(
            q: Tensor,
            tokens: tuple[int, ...],
            roles: tuple[str, ...],
            per_latent: int,
            latents: int,
        ) -> Tensor | None:
            asked = (tokens, roles, per_latent, latents, q.dtype, q.device)
            return self._rows_of(chunk, blend, asked)

        said = contextlib.ExitStack()
        said.enter_context(registry.answer("steering_bias", rows))
        if blend.ramps:
            said.enter_context(registry.answer("steering_ramps", lambda: True))
        return said

    def check_asked(self, chunk: Chunk) -> None:
        """Refuse a chunk whose prompts or older history nobody has weighed.

        Raises:
            LipassError: no attention has asked, or none over the prompt.
        """
        blend = chunk.plan.steering
        if blend is None or not blend.needs_attention:
            return
        asked = self._written.get(chunk, set())
        roles = {role for layout in asked for role in layout[1]}
        older = blend.alpha < 1 and any(latent < blend.since for latent in chunk.context)
        wanted = {"history"} if older else set()
        wanted |= {"text"} if blend.doubled else set()
        if missing := sorted(wanted - roles):
            weighs = "the prompts of a change" if "text" in missing else "older history"
            raise LipassError(
                f"policy {blend.policy!r} needs attention that weighs {weighs}, got a chunk in "
                "which no call has asked for it; compile the model with the option "
                "'steering': True and see in its notes what is kept, or use policy 'lerp'"
            )

    def forget(self, stream: str) -> None:
        """Forget the rows of a stream."""
        self._rows = {key: rows for key, rows in self._rows.items() if key[0] != stream}

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()
        self._written.clear()

    # Rows of a chunk under `inference_mode` are written to by those under `no_grad` too.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _rows_of(self, chunk: Chunk, blend: Blend, layout: _Layout) -> Tensor | None:
        written = self._written.setdefault(chunk, set())
        tokens, _, _, latents, dtype, device = layout
        key = chunk.plan.stream, layout
        if layout not in written or key not in self._rows:
            parts = _parts(chunk, blend, layout)
            if parts is None:
                return None
            rows = self._rows.get(key)
            if rows is None:
                rows = torch.zeros(1, 1, latents, sum(tokens), dtype=dtype, device=device)
                # Lengths of a history that grows come once.
                while len(self._rows) >= _ROWS_MAX:
                    self._rows.pop(next(iter(self._rows)))
                self._rows[key] = rows
            rows.zero_()
            for start, end, added in parts:
                rows[..., start:end] = rows.new_tensor(added)[:, None]
            written.add(layout)
        return self._rows[key].clone()  # the graph may write to what it gets


_ROWS_MAX = 16


_Part = tuple[int, int, list[float]]


def _parts(chunk: Chunk, blend: Blend, layout: _Layout) -> list[_Part] | None:
    """Return what is added to which keys, for each latent of the queries or for all.

    None where the text of a call is another one.
    """
    tokens, roles, per_latent, of_queries, _, _ = layout
    of_old, of_new = blend.logs(of_queries)
    of_history = [blend.log_alpha]
    parts: list[_Part] = []
    start = 0
    for count, role in zip(tokens, roles, strict=True):
        if role == "text" and blend.doubled:
            if count not in _lengths(chunk):
                return None
            middle = start + count // 2
            parts += [(start, middle, of_old), (middle, start + count, of_new)]
        if role == "history" and blend.alpha < 1:
            latents = _latents(chunk, count, per_latent)
            for place, latent in enumerate(latents):
                if latent < blend.since:
                    at = start + place * per_latent
                    parts.append((at, at + per_latent, of_history))
        start += count
    return parts


def _lengths(chunk: Chunk) -> set[int]:
    """Return how many tokens the text of a chunk has, both prompts together."""
    return {tensor.shape[-2] for tensor in text_tensors(chunk.text) if tensor.dim() > 1}


def _latents(chunk: Chunk, tokens: int, per_latent: int) -> list[int]:
    """Say which latents a call reads as its history, in the order of its keys.

    As many as are held are all of them as they lie, also where all were chosen: `held` is what the
    loop says of that order, and the context is ascending.

    Raises:
        LipassError: as many as neither the chunk chose nor the loop holds.
    """
    count, rest = divmod(tokens, per_latent)
    if not rest:
        for known in (list(chunk.held), chunk.context):
            if len(known) == count:
                return known
    raise LipassError(
        f"older history can be weighed where it is known which latents a call reads, got {tokens} "
        f"tokens of {per_latent} a latent, for {len(chunk.context)} chosen latents and "
        f"{len(chunk.held)} held ones; pass held=[...] to session.chunk, or alpha=1"
    )
