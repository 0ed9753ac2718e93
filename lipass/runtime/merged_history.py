"""Keep what was merged of a history from chunk to chunk, and see what has been added to it.

A model is called several times a chunk with the same history, and in the next chunk with a longer
one. What is merged belongs to a session, a stream and a site; rows that are new since the last
call are added to it, and nothing is merged twice.

Which rows are new is seen by what they hold, not by where they lie: a cache grows by `cat`, or its
oldest rows are written over or shifted away. Rows that have left the cache stay merged until their
slots are needed: no more are filled than the cache has rows, or `kv_tokens` allows. Where that
does not explain what is given, as after a reset or with the cache of another rollout, all of it is
merged anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lipass.kernels import registry
from lipass.kernels.merge.rows import row_marks
from lipass.kernels.merge.running import MergedKeys, MergeRule, RunningMerge, query_metric
from lipass.kernels.merged_history import check_finite
from lipass.runtime.scope import branch_name

if TYPE_CHECKING:
    from lipass.session import Session

_KEPT = ("metric", "marks", "ordinals", "count", "additions")

Merge = Callable[[Tensor, Tensor, Tensor, float, MergeRule, str], MergedKeys]


@contextmanager
def unmerged() -> Iterator[None]:
    """Have the calls inside read histories as they are given."""
    with registry.answer("merge_history", lambda *_: None):
        yield


class _Seen:
    """Where a tensor lay and how often it had been written to; it is not kept alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._state = _state(tensor)

    def is_same(self, tensor: Tensor) -> bool:
        """Whether a tensor lies there, unwritten; never where torch does not count writes."""
        if tensor.is_inference() or self._storage.expired():
            return False
        return (
            tensor.untyped_storage()._cdata == self._storage.cdata
            and _state(tensor) == self._state
        )


def _state(tensor: Tensor) -> tuple[object, ...]:
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version


@dataclass
class _Site:
    """One history.

    Attributes:
        running: what has been merged.
        merged: what attention reads.
        seen: where keys and values of the latest call lay; None where that was another process.
        metric: of the queries so far, see `query_metric`.
        marks: what each row of the latest call held `[L]`.
        ordinals: which row of the history each of them was `[L]`, counted from 0.
        count: rows of the history so far.
        additions: how often rows have come.
    """

    running: RunningMerge
    merged: MergedKeys
    seen: tuple[_Seen, _Seen] | None
    metric: Tensor
    marks: Tensor
    ordinals: Tensor
    count: int
    additions: int = 1

    def state(self) -> dict[str, Any]:
        """Give all but where tensors lay; `restored` takes it back."""
        own = {name: getattr(self, name) for name in _KEPT}
        dtype = str(self.merged.v.dtype).removeprefix("torch.")
        return {**own, "running": self.running.state(), "dtype": dtype}

    @classmethod
    def restored(cls, state: dict[str, Any], device: torch.device) -> _Site:
        """Build the history of a `state` where it is asked for."""
        running = RunningMerge.restored(state["running"], device)
        merged = running.merged(getattr(torch, state["dtype"]))
        own = {name: state[name] for name in _KEPT}
        return cls(running, merged, None, **{**own, "metric": own["metric"].to(device)})


class MergedHistories:
    """What a session has merged, by stream and site.

    Attributes:
        added: calls that added rows to what was merged.
        anew: calls that merged a history from its first row on.
    """

    def __init__(self, session: Session) -> None:
        self.added = 0
        self.anew = 0
        self._session = session
        self._sites: dict[tuple[str, str, MergeRule], _Site] = {}
        self._answers: dict[str, Merge] = {}
        self._restored: dict[tuple[str, str, MergeRule], dict[str, Any]] = {}

    def answering(self, stream: str) -> AbstractContextManager[None]:
        """Answer the calls inside from what is kept of a stream and the branch of it."""
        branch = branch_name(self._session)
        name = f"{stream}/{branch}" if branch else stream
        if name not in self._answers:
            self._answers[name] = self._of_stream(name)
        return registry.answer("merge_history", self._answers[name])

    def _of_stream(self, stream: str) -> Merge:
        @torch.inference_mode(False)
        @torch.no_grad()
        def merged(
            q: Tensor, k: Tensor, v: Tensor, scale: float, rule: MergeRule, site: str
        ) -> MergedKeys:
            key = (stream, site, _of_any_length(rule))
            if key in self._restored:
                self._sites[key] = _Site.restored(self._restored.pop(key), k.device)
            held = self._sites.get(key)
            if held is not None:
                _check_kind(held, k, stream, site)
                if held.seen and all(map(_Seen.is_same, held.seen, (k, v))):
                    return held.merged
            metric = functools.partial(query_metric, q, scale, k.shape[1])
            held = self._sites[key] = self._updated(held, k, v, metric, rule)
            return held.merged

        return merged

    def forget(self, stream: str) -> None:
        """Forget a stream and its branches; the counts stay."""

        def goes_on(name: str) -> bool:
            return name != stream and not name.startswith(f"{stream}/")

        self._sites = {key: one for key, one in self._sites.items() if goes_on(key[0])}
        self._restored = {key: one for key, one in self._restored.items() if goes_on(key[0])}
        self._answers = {name: one for name, one in self._answers.items() if goes_on(name)}

    def clear(self) -> None:
        """Forget all; the counts stay."""
        self._sites.clear()
        self._answers.clear()
        self._restored.clear()

    def state(self) -> dict[str, Any]:
        """Give all that was merged; `restore` takes it back."""
        held = {key: site.state() for key, site in self._sites.items()} | self._restored
        sites = [[stream, site, [*rule], state] for (stream, site, rule), state in held.items()]
        return {"added": self.added, "anew": self.anew, "sites": sites}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a `state` was given; what was merged goes to the device that asks for it."""
        self.added, self.anew = state["added"], state["anew"]
        self._restored = {
            (stream, site, _of_any_length(MergeRule(*rule))): held
            for stream, site, rule, held in state["sites"]
        }

    def _updated(
        self,
        held: _Site | None,
        k: Tensor,
        v: Tensor,
        metric: Callable[[], Tensor],
        rule: MergeRule,
    ) -> _Site:
        # Read from a device, where the cache is another one or was written to: once a chunk.
        seen, marks = (_Seen(k), _Seen(v)), row_marks(k, v).cpu()
        known = None if held is None else _known(held, marks)
        if held is None or known is None:
            check_finite(k)
            self.anew += 1
            running, rows = RunningMerge(k, rule), torch.arange(len(marks))
            running.add(k, v, now := metric())
            return _Site(running, running.merged(v.dtype), seen, now, marks, rows, len(rows))
        fresh = (known < 0).nonzero()[:, 0]
        if not len(fresh):
            held.seen = seen
            return held
        at = fresh.to(k.device)
        added = k.index_select(2, at), v.index_select(2, at)
        check_finite(added[0])
        self.added += 1
        running, count = held.running, held.count + len(fresh)
        if len(marks) < count:  # some have left
            running.limit(len(marks), keep_sink=_has_sink(known, rule))
        # Queries of this chunk and of those before, as often as rows were added.
        now = held.metric + (metric() - held.metric) / (held.additions + 1)
        running.add(*added, now)
        rows = known.index_copy(0, fresh, torch.arange(held.count, count))
        kept = running.merged(v.dtype)
        return _Site(running, kept, seen, now, marks, rows, count, held.additions + 1)


def _of_any_length(rule: MergeRule) -> MergeRule:
    """Leave out how long a chunk is: a history is the same where the last one is shorter."""
    return rule._replace(chunk_tokens=0)


def _known(held: _Site, marks: Tensor) -> Tensor | None:
    """Tell which rows of the history are given `[L]`, -1 for new ones; None if it is another.

    It is the same if no fewer rows are given than before, and the oldest are those that left. Two
    rollouts may share their sink, so where rows left others beyond it have to be there still.
    """
    if len(marks) < len(held.marks):
        return None
    ordered, order = held.marks.sort()
    place = torch.searchsorted(ordered, marks).clamp(max=len(ordered) - 1)
    found = ordered[place] == marks
    known = torch.where(found, held.ordinals[order[place]], -1)
    left = held.ordinals[~torch.isin(held.ordinals, known)]
    if not bool(found.any()):
        return None
    sink = held.running.rule.sink_tokens
    stayed = known[known >= sink]
    if left.numel() and (not stayed.numel() or int(left.max()) > int(stayed.min())):
        return None
    return None if int((~found).sum()) + sink > len(marks) else known


def _has_sink(known: Tensor, rule: MergeRule) -> bool:
    return int(((known >= 0) & (known < rule.sink_tokens)).sum()) == rule.sink_tokens


def _check_kind(held: _Site, k: Tensor, stream: str, site: str) -> None:
    """Raise a `ValueError` where a history is of another batch, of other heads or elsewhere."""
    was, given = _kind(held.merged.k), _kind(k)
    if was != given:
        raise ValueError(
            "a history must keep its batch, heads, dtype and device within a stream, got keys "
            f"{given} at {site} of stream {stream!r} after {was}; call each cache in a stream of "
            "its own, session.chunk(stream=...) or session.stream(...)"
        )


def _kind(k: Tensor) -> str:
    batch, heads, _, dim = k.shape
    return f"[{batch}, {heads}, L, {dim}] {str(k.dtype).removeprefix('torch.')} on {k.device}"
