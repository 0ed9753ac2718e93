"""End a receipt with what a reader wants to know: what was skipped, what changed, what to try."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lipass.policy.plan import ChunkPlan
    from lipass.receipt import ChunkRecord, Report

_OVER_LATENTS = ("prefill", "self", "decode")
_EXACT = ("off", "exact")
# Fewer chunks than this, compiled before, say nothing about speed.
_TIMED_CHUNKS = 3


def ending(report: Report) -> str:
    """Give one sentence a question; nothing for a report of nothing."""
    if not (report.graphs or report.sites or report.sessions or report.left_eager):
        return ""
    said = [_skipped(report), _speed(report), _changed(report), f"Next: {_next(report)}."]
    return " ".join(one for one in said if one)


def _skipped(report: Report) -> str:
    shares = []
    chunks = [one for one in report.chunks if one.preset != "off"]
    seen = [one for one in chunks if one.latents_read is not None]
    there = sum(one.plan.history_latents for one in seen)
    read = sum(_read(one) for one in seen)
    if read < there:
        shares.append(f"{1 - read / there:.0%} of the history")
    total = sum(one.plan.steps.total for one in chunks if one.plan.steps is not None)
    skipped = sum(one.steps_skipped for one in chunks)
    if skipped:
        shares.append(f"{skipped / total:.0%} of the steps")
    visited = [one.density for one in report.sites.values() if one.density is not None]
    if visited and (density := statistics.mean(visited)) < 0.995:
        held = [one.kept_mass for one in report.sites.values() if one.kept_mass is not None]
        shares.append(f"{1 - density:.0%} of the key blocks at {_sites(len(visited))}")
        if held:
            shares[-1] += (
                f", which held {1 - statistics.mean(held):.0%} of the attention (sampled)"
            )
    said = f"Skipped: {', '.join(shares)}." if shares else "Nothing was left out."
    unseen = [one.plan for one in chunks if one.latents_read is None]
    chosen, of = (sum(map(count, unseen)) for count in (_chosen, _history))
    if chosen < of and not seen:
        said += (
            f" A session left out {1 - chosen / of:.0%} of the history: so does a loop that reads "
            "chunk.context; no compiled call shows what it read."
        )
    return said


def _chosen(plan: ChunkPlan) -> int:
    return len(plan.context.indices)


def _history(plan: ChunkPlan) -> int:
    return plan.history_latents


def _sites(count: int) -> str:
    return "1 site" if count == 1 else f"{count} sites"


def _read(record: ChunkRecord) -> int:
    return max(len(record.plan.context.indices), record.latents_read or 0)


def _speed(report: Report) -> str:
    """Compare the chunks of equal place and history under `off` with those under another preset.

    Chunks in which something was compiled do not count.
    """
    presets = list(dict.fromkeys(one.preset for one in reversed(report.chunks) if one.preset))
    others = [preset for preset in presets if preset != "off"]
    if "off" not in presets or not others:
        return ""
    dense, fast = (_times(report.chunks, preset) for preset in ("off", others[0]))
    both = sorted(dense.keys() & fast.keys())
    if len(both) < _TIMED_CHUNKS:
        return ""
    ratio = sum(dense[key] for key in both) / max(sum(fast[key] for key in both), 1e-9)
    way = f"{ratio:.2f}x as fast as" if ratio >= 1 else f"slower, at {ratio:.2f}x the speed of,"
    return f"Measured over {len(both)} chunks, {others[0]!r} is {way} 'off'."


def _times(chunks: Iterable[ChunkRecord], preset: str) -> dict[tuple[int, int], float]:
    found: dict[tuple[int, int], list[float]] = {}
    for one in chunks:
        if one.preset == preset and not one.compiled:
            found.setdefault((one.plan.index, one.plan.history_latents), []).append(one.seconds)
    return {key: statistics.median(seconds) for key, seconds in found.items()}


def _changed(report: Report) -> str:
    presets = _presets(report)
    if presets and set(presets) <= {"off"}:
        return "Preset 'off' changes nothing: results are those of torch.compile."
    if set(presets) <= {*_EXACT} or _skipped(report).startswith("Nothing"):
        return "Results are those of the model to rounding (exact)."
    return "What is skipped changes results (approximate): compare them with preset 'off'."


def _presets(report: Report) -> list[str]:
    """List presets of graphs and of sessions, which may skip what no graph does."""
    of_chunks = (one.preset for one in report.chunks if one.preset)
    return list(dict.fromkeys((*report.presets, *of_chunks)))


def _next(report: Report) -> str:
    """Say the one thing that helps most."""
    over = [site for site in report.sites.values() if site.role in _OVER_LATENTS]
    presets = _presets(report)
    approximate = set(presets) - {*_EXACT}
    if report.left_eager:
        return "mend what is not compiled, above; nothing is gained there"
    if over and all("gradient is recorded" in site.reason for site in over):
        return "call the model under torch.no_grad(); attention that records gradients stays dense"
    if presets and set(presets) <= {"off"}:
        return "preset 'exact', which keeps results, or 'all', which skips work"
    if not report.graphs and not report.sites:
        return "call a model that torch.compile(backend='light_interaction') has made"
    if not over:
        return "`lipass inspect` says where attention is; what no graph shows calls lipass.attend"
    if not approximate and presets:
        return "preset 'all', which skips work, and a lipass.Session around the loop"
    if not report.sessions:
        return "open a lipass.Session around the loop, which chooses frames and steps"
    if report.idle:
        return "mend the cause that stands above"
    asked = [one for one in report.chunks if one.preset not in _EXACT]
    if wider := sum(_read(one) > len(one.plan.context.indices) for one in asked):
        return (
            f"encode chunk.context only: {wider} of {len(asked)} chunks read more of the history "
            "than was chosen"
        )
    if any(one.plan.revisit.allowed and one.plan.steps is None for one in asked):
        return (
            "loop over chunk.steps(sigmas): steps could be reused, and no chunk was asked for them"
        )
    dense = [site for site in over if site.ran_dense]
    if dense and len(dense) == len(over):
        return f"see why {_sites(len(dense))} ran dense, above: no block was left out"
    if kept := sum(site.action == "kept" for site in over):
        return f"`lipass explain` says why {_sites(kept)} {'is' if kept == 1 else 'are'} kept"
    if not _speed(report):
        return "run the same walk with preset 'off' in this process, to see how much faster it is"
    return "look at the pictures of both; `lipass options` lists what trades speed for them"
