"""Choose a provider for each kernel call, and count per site what ran and why.

A provider is one implementation of an operation. It answers `why_not(...)` with the reason why it
cannot take a call, or None. Counting never reads a device tensor before `telemetry()` is asked.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lipass.kernels.estimate import capturing

log = logging.getLogger(__name__)

# Looking at one call in so many costs less than a hundredth of them.
_CALLS_A_SAMPLE = 32
# So many tensors of a site are kept unread at most: then they become one, which takes a sum.
_PENDING_MAX = 256

Route = Literal["sparse", "dense"]

# Best first. Modules are imported when they are asked, so that Triton loads only where it can run.
_PROVIDERS = {
    ("pool", "cpu"): ("native", "vectorized", "reference"),
    ("pool", "cuda"): ("triton", "vectorized"),
    ("select", "cpu"): ("vectorized", "reference"),
    ("select", "cuda"): ("triton", "vectorized"),
    ("block_sparse", "cpu"): ("native", "gather", "reference"),
    ("block_sparse", "cuda"): ("tma", "triton"),
}
# What is asked only where it was measured; by hope it is never called.
_CONTENDERS: dict[tuple[str, str], tuple[str, ...]] = {("block_sparse", "cuda"): ("gluon", "fa4")}
_left_out: dict[str, str] = {}
# On other devices. No attention is computed block by block in Python there unless it is asked for
# by name: calls that no kernel takes are dense.
_ELSEWHERE: dict[str, tuple[str, ...]] = {"pool": ("vectorized",), "select": ("vectorized",)}


class _Forced(NamedTuple):
    """What `force` asks for, and of whom not."""

    route: Route | None = None
    reason: str = ""
    but_roles: tuple[str, ...] = ()
    outside: _Forced | None = None
    """What holds for those roles: that of the block around."""


_route: contextvars.ContextVar[_Forced] = contextvars.ContextVar(
    "route",
    default=_Forced(),  # noqa: B039  (a tuple)
)
_calls: contextvars.ContextVar[dict[str, int] | None] = contextvars.ContextVar(
    "calls", default=None
)
_answers: contextvars.ContextVar[dict[str, Callable[..., Any]] | None] = contextvars.ContextVar(
    "answers", default=None
)
_preferred: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar(
    "preferred", default=None
)
_owner: contextvars.ContextVar[str] = contextvars.ContextVar("owner", default="")
_sites: dict[str, SiteCounts] = {}
# Held by who takes pending sums: calls of other threads go on adding to them.
_taking = threading.Lock()


@dataclass
class SiteCounts:
    """What happened at one attention site since the last reset."""

    site: str
    role: str = ""
    calls: int = 0
    sparse_calls: int = 0
    dense_calls: int = 0
    provider: str = ""
    """Implementation of the latest call; `"sdpa"` where it was dense."""
    reason: str = ""
    """Why the latest dense call was kept dense; empty if there was none."""
    refusals: dict[str, int] = field(default_factory=dict)
    """Calls per reason for which a provider refused, `"provider: reason"`."""
    visited_blocks: int = 0
    """Block pairs visited, over batch, heads and query blocks; dense calls count all pairs."""
    total_blocks: int = 0
    kept_plans: int = 0
    """Sparse calls that visited blocks which an earlier call chose."""
    dropped_latents: int = 0
    """Latent frames that `keep_frames` took out, summed over calls."""
    kept_mass: float = 0.0
    """Attention mass that visited keys held, of sampled queries; summed over samples."""
    mass_samples: int = 0
    score_errors: Tensor | None = None
    """Of a history that is merged: most that a score may have moved by, and their root mean
    square, `[2]`."""
    pending: list[Tensor] = field(default_factory=list, repr=False)
    """Device sums of visited blocks not read yet."""
    pending_mass: list[Tensor] = field(default_factory=list, repr=False)
    """Sums of the masses that are numbers, and how many they are, `[2]`; not read yet."""

    @property
    def density(self) -> float:
        """Share of block pairs that were visited."""
        return self.visited_blocks / max(self.total_blocks, 1)

    @property
    def mass(self) -> float | None:
        """Mean share of the attention mass that visited keys held; None where none was sampled."""
        return self.kept_mass / self.mass_samples if self.mass_samples else None


@contextlib.contextmanager
def force(
    route: Route | None,
    reason: str = "forced by registry.force",
    *,
    but_roles: tuple[str, ...] = (),
) -> Iterator[None]:
    """Bypass the cost gate inside the block: `"sparse"` or `"dense"`; None leaves it in charge.

    `reason` is what the counts say of calls that `"dense"` keeps dense. Calls of `but_roles` stay
    as they were.
    """
    if route not in ("sparse", "dense", None):
        raise ValueError(f"route must be 'sparse', 'dense' or None, got {route!r}")
    token = _route.set(_Forced(route, reason, but_roles, _route.get()))
    try:
        yield
    finally:
        _route.reset(token)


def forced_route(role: str = "") -> Route | None:
    """Return the route that `force` asks for, of calls of a role."""
    forced = _route.get()
    while role in forced.but_roles and forced.outside is not None:
        forced = forced.outside
    return forced.route


def forced_reason() -> str:
    """Return why `force` asks for it."""
    return _route.get().reason


@contextlib.contextmanager
def answer(operation: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let a function of the caller stand in for an operation inside the block.

    Who opens it knows more than the tensors of a call say; the operation asks `answer_of`.
    """
    token = _answers.set({**(_answers.get() or {}), operation: function})
    try:
        yield
    finally:
        _answers.reset(token)


def answer_of(operation: str) -> Callable[..., Any] | None:
    """Return what stands in for an operation, or None."""
    answers = _answers.get()
    return None if answers is None else answers.get(operation)


@contextlib.contextmanager
def prefer(operation: str, provider: str) -> Iterator[None]:
    """Ask a provider of an operation before all others inside the block; it may refuse a call.

    This is how one is measured that nobody has seen win yet, such as `flex`.
    """
    token = _preferred.set({**(_preferred.get() or {}), operation: provider})
    try:
        yield
    finally:
        _preferred.reset(token)


class Choice(NamedTuple):
    """The provider of one call, and why better ones were passed over."""

    name: str
    module: ModuleType
    refusals: list[tuple[str, str]]
    """Provider and reason, best first."""


class Refused(NamedTuple):
    """That no provider takes a call."""

    reason: str
    refusals: list[tuple[str, str]]
    """Provider and reason, best first."""


def choose(
    operation: str,
    device: torch.device,
    provider: str | None,
    why_not: Callable[[ModuleType], str | None],
    measured: tuple[str, ...] = (),
) -> Choice:
    """Pick the named provider, or the best one for the device that does not refuse.

    Those that were `measured`, fastest first, are asked before others.

    Raises:
        ValueError: if the named provider does not exist or refuses, or if all refuse.
    """
    names = _names(operation, device, measured) if provider is None else (provider,)
    found = _ask(operation, names, why_not)
    if isinstance(found, Choice):
        return found
    said = _said(found, device)
    others = [name for name in (*_names(operation, device), "reference") if name not in names]
    remedy = f"try provider={others[0]!r}" if others else "build or install one of them"
    if others == ["reference"]:
        remedy += ", which takes every call, one block after the other"
    raise ValueError(f"a provider of {operation} must take the call, got {said}; {remedy}")


def find(
    operation: str,
    device: torch.device,
    why_not: Callable[[ModuleType], str | None],
    measured: tuple[str, ...] = (),
) -> Choice | Refused:
    """Pick the best provider for the device that does not refuse, or say why there is none.

    Those that were `measured`, fastest first, are asked before others.
    """
    found = _ask(operation, _names(operation, device, measured), why_not)
    if isinstance(found, Choice):
        return found
    return Refused(f"no kernel takes it: {_said(found, device)}", found)


def contenders(operation: str, device: torch.device) -> tuple[str, ...]:
    """Name the providers that are called only where they were measured to be fast."""
    return _CONTENDERS.get((operation, device.type), ())


def providers(operation: str, device: torch.device) -> tuple[str, ...]:
    """Name the providers of a device, best first where none was measured."""
    return _PROVIDERS.get((operation, device.type), _ELSEWHERE.get(operation, ()))


def _names(
    operation: str, device: torch.device, measured: tuple[str, ...] = ()
) -> tuple[str, ...]:
    names = providers(operation, device)
    first = (_preferred.get() or {}).get(operation)
    if first is None and not measured:
        return names
    return tuple(dict.fromkeys(([] if first is None else [first]) + [*measured, *names]))


def _ask(
    operation: str, names: tuple[str, ...], why_not: Callable[[ModuleType], str | None]
) -> Choice | list[tuple[str, str]]:
    refusals: list[tuple[str, str]] = []
    for name in names:
        module = module_of(operation, name)
        reason = module if isinstance(module, str) else why_not(module)
        if reason is None:
            assert not isinstance(module, str)
            return Choice(name, module, refusals)
        refusals.append((name, reason))
    return refusals


def _said(refusals: list[tuple[str, str]], device: torch.device) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in refusals:
        by_reason.setdefault(reason, []).append(name)
    said = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
    return said or f"none for {device.type}"


def leave_out(provider: str, why: str) -> None:
    """Have a provider refuse all calls of this process, as where it was seen to hang."""
    _left_out[provider] = why
    module_of.cache_clear()


@functools.lru_cache(maxsize=64)
def module_of(operation: str, provider: str) -> ModuleType | str:
    """Import a provider, or say why that fails; once, as asking `importlib` takes 5 us a call."""
    if provider in _left_out:
        return _left_out[provider]
    try:
        return importlib.import_module(f"lipass.kernels.{operation}.{provider}")
    except ImportError as error:
        return f"not available: {error}"


@contextlib.contextmanager
def one_call() -> Iterator[None]:
    """Count from the first layer on in code that layers share: one run of a compiled graph."""
    token = _calls.set({})
    try:
        yield
    finally:
        _calls.reset(token)


@contextlib.contextmanager
def counted_for(owner: str) -> Iterator[None]:
    """Count the calls inside as `owner/site`: its sites have the names of another model's."""
    token = _owner.set(owner)
    try:
        yield
    finally:
        _owner.reset(token)


def site_of_call(joint: str) -> str:
    """Return which of the sites that share one call is calling now; they call in order.

    Outside of `one_call` all count as the first.
    """
    if "," not in joint:
        return joint
    names, calls = joint.split(","), _calls.get()
    if calls is None:
        return names[0]
    count = calls[joint] = calls.get(joint, -1) + 1
    return names[count % len(names)]


def is_sampled(site: str) -> bool:
    """Whether the call that comes next at a site is one whose attention mass is looked at."""
    return _counts(site).sparse_calls % _CALLS_A_SAMPLE == 0


def record_refusal(site: str, provider: str, reason: str) -> None:
    """Count that a provider refused a call; the first time it is logged."""
    counts = _counts(site)
    line = f"{provider}: {reason}"
    if line not in counts.refusals:
        log.info("%s: provider %s refused: %s", site or "attention", provider, reason)
    counts.refusals[line] = counts.refusals.get(line, 0) + 1


def record_call(
    site: str,
    *,
    role: str,
    provider: str,
    visited: int | Tensor,
    total: int,
    kept_dense: str = "",
    dropped_latents: int = 0,
    mass: Tensor | None = None,
    kept_plan: bool = False,
) -> None:
    """Count one call; `kept_dense` is the reason if dense attention ran instead.

    `mass` is what its visited keys held of the attention mass, where that was looked at;
    `kept_plan` whether an earlier call chose them.
    """
    counts = _counts(site)
    counts.role = role
    counts.calls += 1
    counts.provider = provider
    counts.total_blocks += total
    counts.dropped_latents += dropped_latents
    if mass is not None:
        known = mass.isfinite().to(mass.dtype)
        _add(counts.pending_mass, torch.stack([mass.nan_to_num(0.0, 0.0, 0.0), known]))
    if isinstance(visited, Tensor):
        _add(counts.pending, visited)
    else:
        counts.visited_blocks += visited
    counts.kept_plans += kept_plan
    if not kept_dense:
        counts.sparse_calls += 1
        return
    if counts.dense_calls == 0:
        log.info("%s: kept dense: %s", site or "attention", kept_dense)
    counts.dense_calls += 1
    counts.reason = kept_dense


def record_score_errors(site: str, most: Tensor, mean: Tensor) -> None:
    """Note how far merged keys have moved the scores of a call; scalars that are not read."""
    counts, found = _counts(site), torch.stack([most, mean])
    known = counts.score_errors
    counts.score_errors = found if known is None else torch.maximum(known, found)


def telemetry() -> dict[str, SiteCounts]:
    """Return the counts per site, or per `owner/site` of `counted_for`.

    Reads the pending device sums, so not for the hot loop.
    """
    for counts in list(_sites.values()):
        with _taking:
            visited, masses = _taken(counts.pending), _taken(counts.pending_mass)
        counts.visited_blocks += sum(int(part) for part in visited)  # sync-ok: who asks waits
        for mass, samples in (part.tolist() for part in masses):  # sync-ok: the same
            counts.kept_mass += mass
            counts.mass_samples += int(samples)
    return dict(_sites)


def _add(pending: list[Tensor], part: Tensor) -> None:
    """Keep what is not read yet; many become one on each device, without a read."""
    pending.append(part)
    if len(pending) < _PENDING_MAX or capturing():
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    with _taking:
        for one in _taken(pending):
            by_device.setdefault(one.device, []).append(one)
        pending.extend(torch.stack(parts).sum(0) for parts in by_device.values())


def _taken(pending: list[Tensor]) -> list[Tensor]:
    """Take what is there now; what is added meanwhile stays."""
    taken = pending[:]
    del pending[: len(taken)]
    return taken


def counted() -> list[SiteCounts]:
    """Return the live counts of all sites, latest last; sums on a device are not read."""
    return list(_sites.values())


def reset_telemetry() -> None:
    """Forget all counts."""
    _sites.clear()


def _counts(site: str) -> SiteCounts:
    owner = _owner.get()
    return _sites.setdefault(f"{owner}/{site}" if owner else site, SiteCounts(site))
