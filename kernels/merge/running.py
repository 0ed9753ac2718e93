"""Merge a history as it grows, all batch items and heads at once.

What is merged lies in slots of a fixed order. A token that corresponds to a slot takes it over;
all others take slots that are free, and then those that were joined least recently. How many slots
are filled differs between heads: those that are not have a count of 0, hence a bias of `-inf`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Distances that are held at once.
_DISTANCES = 1 << 24
_HELD = ("latents", "_tokens", "_used", "_k", "_v", "_count", "_far", "_moved", "_latest")
_NEVER = torch.iinfo(torch.int64).max // 2


class MergeRule(NamedTuple):
    """What keys are merged by.

    Attributes:
        threshold: least similarity of keys that merge, 0..1 (`lipass.kernels.merge.reference`);
            at 1 they are equal.
        capacity: most tokens that are kept a head; None is any number.
        sink_tokens: leading tokens of the history that stay as they are.
        latent_tokens: tokens of one latent; none of them merge with each other.
        chunk_tokens: tokens that a chunk adds to the history.
    """

    threshold: float
    capacity: int | None
    sink_tokens: int
    latent_tokens: int
    chunk_tokens: int


class MergedKeys(NamedTuple):
    """What attention reads in place of a history, `L` slots.

    Attributes:
        k: `[B, H, L, D]`.
        v: like `k`.
        bias: log of how many keys a slot stands for `[B, H, L]` fp32; `-inf` where it is free.
        farthest: no key was farther from the one that stands for it than this, fp32 scalar.
        moved: root mean square, over queries and tokens, of what scores have changed by, fp32
            scalar; steps that merged one way and back count twice.
    """

    k: Tensor
    v: Tensor
    bias: Tensor
    farthest: Tensor
    moved: Tensor


class RunningMerge:
    """A history that is merged as it grows.

    Args:
        like: keys `[B, H, L, D]` whose batch, heads, dims, dtype and device it has.
        rule: what is merged.
    """

    def __init__(self, like: Tensor, rule: MergeRule) -> None:
        self.rule = self._rule = rule
        self.latents = 0
        """Latents added so far."""
        self._tokens = 0
        self._used = 0
        batch, heads, _, dim = like.shape
        # One slot more than are used, at the end: what is written there is lost.
        self._k = like.new_zeros(batch, heads, 1, dim)
        self._v = like.new_zeros(batch, heads, 1, dim, dtype=torch.float32)
        self._count = like.new_zeros(batch, heads, 1, dtype=torch.float32)
        self._far = torch.zeros_like(self._count)
        self._moved = torch.zeros_like(self._count)
        self._latest = torch.zeros_like(self._count, dtype=torch.int64)

    def add(self, k: Tensor, v: Tensor, metric: Tensor) -> None:
        """Add tokens `[B, H, N, D]` that are new, whole latents, oldest first.

        Args:
            k: their keys.
            v: their values.
            metric: what distances between keys are measured by, from `query_metric`.
        """
        step = self.rule.latent_tokens
        for start in range(0, k.shape[2], step):
            here = slice(start, start + step)
            self._add_latent(k[:, :, here], v[:, :, here], metric)
        # The only number that is read, once for all that is added.
        self._used = int((self._count[:, :, :-1] > 0).sum(-1).amax())

    def merged(self, dtype: torch.dtype) -> MergedKeys:
        """Give what attention reads."""
        used = slice(0, self._used)
        count, moved = self._count[:, :, used], self._moved[:, :, used]
        return MergedKeys(
            self._k[:, :, used],
            self._v[:, :, used].to(dtype),
            count.log(),
            self._far.amax(),
            ((count * moved.square()).sum() / count.sum()).sqrt(),
        )

    def limit(self, slots: int, *, keep_sink: bool) -> None:
        """Fill no more than so many slots from now on, or what the rule says if that is less.

        Args:
            slots: at least as many as are filled.
            keep_sink: whether the leading tokens stay as they are.
        """
        capacity = self._rule.capacity
        sink = self.rule.sink_tokens if keep_sink else 0
        if not keep_sink:
            self._latest[:, :, : self.rule.sink_tokens] = 0
        self.rule = self.rule._replace(
            capacity=slots if capacity is None else min(slots, capacity), sink_tokens=sink
        )

    def state(self) -> dict[str, Any]:
        """Give all that is held, tensors of its own included; `restored` takes it back."""
        held = {name: getattr(self, name) for name in _HELD}
        return {**held, "rule": [*self.rule], "first_rule": [*self._rule]}

    @classmethod
    def restored(cls, state: dict[str, Any], device: torch.device) -> RunningMerge:
        """Build one that goes on where a `state` was given, with tensors of its own."""
        made = cls(state["_k"][:, :, :0], MergeRule(*state["first_rule"]))
        made.rule = MergeRule(*state["rule"])
        for name in _HELD:
            value = state[name]
            is_tensor = isinstance(value, Tensor)
            setattr(made, name, value.to(device, copy=True) if is_tensor else value)
        return made

    def _add_latent(self, k: Tensor, v: Tensor, metric: Tensor) -> None:
        count = k.shape[2]
        sink = min(max(self.rule.sink_tokens - self._tokens, 0), count)
        if sink:
            self._append_sink(k[:, :, :sink], v[:, :, :sink])
            k, v = k[:, :, sink:], v[:, :, sink:]
        if k.shape[2]:
            self._merge(k, v, metric)
        self._tokens += count
        self.latents += 1

    def _append_sink(self, k: Tensor, v: Tensor) -> None:
        self._grow(self._used + k.shape[2])
        here = slice(self._used, self._used + k.shape[2])
        self._k[:, :, here], self._v[:, :, here] = k, v.float()
        self._count[:, :, here], self._latest[:, :, here] = 1.0, _NEVER
        self._used += k.shape[2]

    def _merge(self, k: Tensor, v: Tensor, metric: Tensor) -> None:
        tokens, first = k.shape[2], min(self.rule.sink_tokens, self._used)
        before, room = self._used, self._used + tokens
        if self.rule.capacity is not None:
            room = min(room, self.rule.capacity)
        self._grow(room)
        slot, far, moved, joins = self._correspond(k, slice(first, before), metric)
        lost = self._k.shape[2] - 1
        self._latest.scatter_(2, torch.where(joins, slot, lost), self.latents)
        dest = torch.where(joins, slot, self._slots_for(~joins, slice(first, room)))
        self._write(dest, joins, k, v)
        for sums, step in ((self._far, far), (self._moved, moved)):
            sums.scatter_(2, dest, torch.where(joins, sums.gather(2, dest) + step, 0.0))
        self._used = room

    def _write(self, dest: Tensor, joins: Tensor, k: Tensor, v: Tensor) -> None:
        """Put tokens into their slots, with what is there where they join it."""
        stood = torch.where(joins, self._count.gather(2, dest), 0.0)
        old = self._v.gather(2, _wide(dest, v))
        mean = old + (v.float() - old) / (stood + 1)[..., None]
        self._v.scatter_(2, _wide(dest, v), torch.where(joins[..., None], mean, v.float()))
        self._k.scatter_(2, _wide(dest, k), k)
        self._count.scatter_(2, dest, stood + 1)
        self._latest.scatter_(2, dest, self.latents)

    def _correspond(
        self, k: Tensor, slots: slice, metric: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the slot of each token `[B, H, N]`, and whether it joins.

        In between: how far its key is, and what scores change by if it stands for the other.
        """
        stored = self._k[:, :, slots]
        if stored.shape[2] == 0:
            none = torch.zeros(k.shape[:3], dtype=torch.int64, device=k.device)
            return none, none.float(), none.float(), none.bool()
        free = self._count[:, :, slots] == 0
        nearest, back = _nearest(k.float(), stored.float(), metric, free)
        tokens = torch.arange(k.shape[2], device=k.device)
        mutual = back.gather(2, nearest) == tokens
        slot = nearest + slots.start
        key = self._k.gather(2, _wide(slot, k)).float()
        difference = k.float() - key
        far, moved = difference.norm(dim=3), _square(difference, metric).clamp(min=0).sqrt()
        # There may be directions in which no query looks, so far.
        alike = (
            far == 0 if self.rule.threshold == 1.0 else moved.neg().exp() >= self.rule.threshold
        )
        return slot, far, moved, mutual & alike & ~free.gather(2, nearest)

    def _slots_for(self, alone: Tensor, slots: slice) -> Tensor:
        """Give each token that joins nothing a slot of its own `[B, H, N]`."""
        count, latest = self._count[:, :, slots], self._latest[:, :, slots]
        width = count.shape[2]
        place = torch.arange(width, device=count.device)
        order = torch.where(count > 0, latest * width + place, place - width)
        oldest = order.topk(alone.shape[2], largest=False, sorted=True).indices + slots.start
        return oldest.gather(2, (alone.cumsum(2) - 1).clamp(min=0))

    def _grow(self, slots: int) -> None:
        """Make room for so many slots, and one more; a little ahead, as histories grow."""
        held = self._k.shape[2] - 1
        if slots <= held:
            return
        ahead = max(slots, held + held // 2)
        more = (min(ahead, self.rule.capacity) if self.rule.capacity else ahead) - held
        for name in ("_k", "_v", "_count", "_far", "_moved", "_latest"):
            tensor: Tensor = getattr(self, name)
            tensor[:, :, -1] = 0
            fresh = tensor.new_zeros(*tensor.shape[:2], more, *tensor.shape[3:])
            setattr(self, name, torch.cat([tensor, fresh], 2))


def query_metric(q: Tensor, scale: float, heads: int) -> Tensor:
    """Measure keys by what queries see of them.

    `(k - k')^T metric (k - k')` is the mean square of what scores move by if `k'` stands for `k`.

    Args:
        q: queries `[B, H, Lq, D]`.
        scale: softmax scale.
        heads: of the keys; heads of q that share one count together.

    Returns:
        `[B, heads, D, D]` fp32.
    """
    grouped = q.detach().float().unflatten(1, (heads, -1)).flatten(2, 3)
    return (grouped.mT @ grouped) * (scale**2 / grouped.shape[2])


def _square(x: Tensor, metric: Tensor) -> Tensor:
    """Square the length of `[B, H, N, D]` in a metric."""
    return (x * (x @ metric)).sum(-1)


def _nearest(k: Tensor, stored: Tensor, metric: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest slot of each token `[B, H, N]` and the nearest token of each slot.

    Distances are made for some tokens at a time. NaN is far from everything.
    """
    long = _square(stored, metric).masked_fill(free, torch.inf)
    own = _square(k, metric)
    seen = k @ metric
    step = max(_DISTANCES // max(stored.shape[0] * stored.shape[1] * stored.shape[2], 1), 1)
    slots, tokens, least = [], None, None
    for start in range(0, k.shape[2], step):
        here = slice(start, start + step)
        product = seen[:, :, here] @ stored.mT
        apart = long[:, :, None] + own[:, :, here, None] - 2 * product
        apart = apart.nan_to_num(torch.inf)
        slots.append(apart.argmin(3))
        low, at = apart.min(2)
        if tokens is None or least is None:
            least, tokens = low, at
        else:
            tokens = torch.where(low < least, at + start, tokens)
            least = torch.minimum(low, least)
    assert tokens is not None
    return torch.cat(slots, 2), tokens


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(*index.shape, like.shape[3])
