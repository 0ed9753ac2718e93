"""Explain why each attention site was rewritten or kept: role, grid, keys, and every pass."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
from collections.abc import Iterator
from typing import Any

from lipass.cli import NOTHING_MATCHED, OK, UsageError, repro, target
from lipass.cli.terminal import paint, paragraph

SUMMARY = "explain why attention sites were rewritten or kept"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lipass explain`."""
    target.add_arguments(parser)
    target.add_fake_arguments(parser)
    parser.add_argument(
        "site",
        nargs="?",
        metavar="SITE",
        help="a name or a pattern such as 'blocks.*:decode' (default: one of each kind)",
    )
    repro.add_arguments(parser)
    parser.add_argument(
        "--strict", action="store_true", help="exit with 3 if no attention site is found"
    )


def run(args: argparse.Namespace) -> int:
    """Trace the target and print a paragraph for each site."""
    from lipass.cli.findings import Findings
    from lipass.cli.tracing import pipeline_for, trace_target

    pipeline = pipeline_for(target.options_of(args), args.add)
    findings, repros = Findings(), repro.Repros(args.emit_repro, args.target, pipeline)
    trace = trace_target(
        args.target,
        pipeline,
        fake=args.fake,
        dynamic=args.dynamic or None,
        observers=(findings, repros),
    )
    document = findings.document(args.target, args.preset, pipeline, trace)
    groups = _chosen(document["sites"], args.site)
    print("\n\n".join("\n".join(_lines(group, document)) for group in groups))
    if not groups:
        print(f"no attention site was found in {len(document['graphs'])} graphs")
    repros.write()
    return NOTHING_MATCHED if args.strict and not groups else OK


def _chosen(sites: list[dict[str, Any]], wanted: str | None) -> list[list[dict[str, Any]]]:
    from lipass.cli.inspect_table import alike

    if wanted is None:
        return alike(sites)
    found = [site for site in sites if fnmatch.fnmatchcase(site["name"], wanted)]
    if not found:
        names = list(dict.fromkeys(site["name"] for site in sites))
        close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.3) or names[:1]
        remedy = f"; did you mean {close[0]!r}?" if close else "; the target has no site"
        raise UsageError(f"SITE must name a site of the target, got {wanted!r}{remedy}")
    return [[site] for site in found]


def _lines(group: list[dict[str, Any]], document: dict[str, Any]) -> Iterator[str]:
    from lipass.cli.inspect_table import group_name, shape, work
    from lipass.passes.graph.names import without_repeat

    site = group[0]
    title = group_name(group) + (f" ({len(group)} sites)" if len(group) > 1 else "")
    yield paint(title, "bold") + f"  {site['source']}, graph {site['graph']}"
    yield from paragraph(f"{site['action']}: {site['reason']}", 2)
    yield from paragraph(f"role {site['role']}: {site['why']}", 2)
    yield from paragraph(f"queries {shape(site['grid'])}, {work(site['flops'])} a call", 2)
    for part in site["segments"]:
        yield from paragraph(f"keys {part['role']} {shape(part['grid'])}: {part['why']}", 2)
    if site["density"] is not None:
        yield from paragraph(
            f"would run by {site['provider']}, {site['density']:.0%} of the key blocks", 2
        )
    for one in document["passes"]:
        if one["graph"] != site["graph"]:
            continue
        for note in one["notes"]:
            if without_repeat(note["site"]) == without_repeat(site["name"]):
                yield from paragraph(f"{one['name']}: {note['action']}, {note['reason']}", 4)
                break
