"""Say what became of each attention site of a graph, and which pass decided it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.fx

from lipass.errors import LipassError
from lipass.passes.attention.site import OVER_LATENTS, AttentionSite, sites
from lipass.passes.core import Note, Numerics, PassPipeline
from lipass.passes.graph.compat import is_symbolic
from lipass.passes.graph.names import names_of, without_repeat
from lipass.receipt import SiteRecord
from lipass.runtime.agreement import tell

_WITH_CAMERAS = ("prefill", "decode")


def graphs_of(gm: torch.fx.GraphModule) -> list[torch.fx.Graph]:
    """List the graph and those of the modules that passes outlined from it."""
    return [m.graph for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]


def found_in(gm: torch.fx.GraphModule) -> list[AttentionSite]:
    """List the sites of a graph, those apart that share a call."""
    return [
        replace(site, name=name)
        for graph in graphs_of(gm)
        for _, site in sites(graph)
        for name in names_of(site.name)
    ]


def site_records(
    found: Iterable[AttentionSite], pipeline: PassPipeline, notes: Iterable[Note], model: str = ""
) -> list[SiteRecord]:
    """Give each site its record.

    Only passes that rewrite attention decide about a site. What one of them says of the whole
    graph holds for each of its sites over a context; a pass that approximates has the last word.
    """
    found, deciding = list(found), {p.name: p for p in pipeline if p.rewrites_attention}
    told = [note for note in notes if note.pass_name in deciding]
    names = {without_repeat(site.name) for site in found}
    whole = [note for note in told if without_repeat(note.site) not in names]
    made = []
    for site in found:
        name = without_repeat(site.name)
        own = [
            note
            for note in told
            if without_repeat(note.site) == name or (site.role in _WITH_CAMERAS and note in whole)
        ]
        last = [n for n in own if deciding[n.pass_name].numerics is Numerics.APPROX] or own
        action, reason = _decision(last) if last else ("kept", _untouched(site, list(deciding)))
        made.append(
            SiteRecord(
                name=site.name,
                source=site.where,
                role=site.role,
                grid=site.q_grid and tuple(_plain(size) for size in site.q_grid),
                segments=tuple(segment.role for segment in site.segments),
                action=action,
                reason=reason,
                model=model,
            )
        )
    return made


def _decision(notes: list[Note]) -> tuple[str, str]:
    """Take the last rewrite; a site that one pass has rewritten stays so if another keeps it."""
    rewrites = [note for note in notes if note.action == "rewritten"]
    if not rewrites:
        return notes[-1].action, notes[-1].reason
    kept = [note.reason for note in notes[notes.index(rewrites[-1]) + 1 :]]
    return "rewritten", "; ".join([rewrites[-1].reason, *kept])


def _untouched(site: AttentionSite, deciding: list[str]) -> str:
    if site.role == "other":
        return f"other: {site.reason}"
    if not deciding:
        return "no pass of the pipeline rewrites attention"
    return f"{', '.join(deciding)}: nothing to rewrite"


def makes_sparse(pipeline: PassPipeline) -> bool:
    """Whether attention over latents is to become sparse."""
    return any(one.rewrites_attention and one.section == "sparse" for one in pipeline)


def tell_gradients(records: Iterable[SiteRecord], pipeline: PassPipeline, model: str) -> None:
    """Warn where attention over latents stays as it is because a gradient is recorded."""
    over = [one for one in records if one.role in OVER_LATENTS]
    recorded = [one for one in over if "gradient is recorded" in one.reason]
    if not recorded or not makes_sparse(pipeline):
        return
    tell(
        f"attention can be made sparse where no gradient is recorded, got {len(recorded)} of "
        f"{len(over)} sites of {model or 'a model'} that record one and stay dense; call the "
        "model under torch.no_grad()",
        strict=False,
    )


def refuse_dense(
    found: Iterable[AttentionSite], pipeline: PassPipeline, notes: Iterable[Note]
) -> None:
    """Raise if the pipeline makes attention sparse and could not where it should have.

    Raises:
        LipassError: sites over latents, or of a kind nobody knows, that stay dense.
    """
    if not makes_sparse(pipeline):
        return
    records = site_records(
        (site for site in found if site.role not in ("cross", "text")), pipeline, notes
    )
    dense = [r for r in records if r.action == "kept" and "dense_layers" not in r.reason]
    if dense:
        lines = "\n".join(
            f"  {r.name} ({r.source or 'no source line'}): {r.reason}" for r in dense
        )
        raise LipassError(
            f"strict: every attention over latents must become sparse, got {len(dense)} that stay "
            f"dense:\n{lines}\nfix the cause, name the layers in sparse.dense_layers, or set "
            "strict to False"
        )


def refuse_unmerged(found: Iterable[AttentionSite], notes: Iterable[Note]) -> None:
    """Raise if histories were to be merged and one is read as it is.

    Raises:
        LipassError: naming those sites, and such as may read one for all that is known.
    """
    kept = {
        without_repeat(note.site): note.reason
        for note in notes
        if note.pass_name == "merge-history" and note.action == "kept"
    }
    lines = [
        f"  {site.name} ({site.where or 'no source line'}): {why}"
        for site in found
        if site.role in ("decode", "other") and (why := kept.get(without_repeat(site.name)))
    ]
    if lines:
        told = "\n".join(lines)
        raise LipassError(
            f"strict: every history must be merged, got {len(lines)} sites that are not:\n{told}\n"
            "fix the cause, set 'merge' to False, or set strict to False"
        )


def _plain(size: int | torch.SymInt) -> int | str:
    return str(size) if is_symbolic(size) else int(size)
