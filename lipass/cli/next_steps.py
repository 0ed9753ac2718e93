"""Say what to do next with a model that was inspected: the most useful first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

_OVER_LATENTS = ("prefill", "self", "decode")
_SHOWN = 4


def next_steps(document: dict[str, Any]) -> list[str]:
    """Return a few sentences, each something to do."""
    return list(_steps(document))[:_SHOWN]


def _steps(document: dict[str, Any]) -> Iterator[str]:
    sites = document["sites"]
    over = [site for site in sites if site["role"] in _OVER_LATENTS]
    rewritten = [site for site in over if site["action"] == "rewritten"]
    if document["graph_breaks"]:
        first = document["graph_breaks"][0]
        yield (
            f"mend the {len(document['graph_breaks'])} graph breaks above, {first['source']} "
            "first: passes see each piece by itself"
        )
    if not document["graphs"]:
        yield "make the target return what is called with tensors: nothing of it was compiled"
        return
    if not sites:
        yield (
            "no attention was found: call F.scaled_dot_product_attention, or lipass.attend where "
            "Dynamo cannot look inside; lipass.adopt(model) does it for released models"
        )
        return
    if document["preset"] == "off":
        yield "try --preset all: with 'off' no pass runs"
        return
    yield from _kept(over or [site for site in sites if _unknown(site)])
    if not rewritten and any("name the pieces" in site["reason"] for site in sites):
        yield "inspect with --dynamic: lengths that vary say by themselves what a history is"
    dense = [site for site in rewritten if "here it would run dense" in site["reason"]]
    if dense:
        yield (
            f"{len(dense)} rewritten sites would run dense on this machine, as that is predicted "
            "to be faster: inspect the sizes that you serve, on the device that you serve them on"
        )
    if not document["poses"] and any(site["role"] == "decode" for site in over):
        yield (
            "no cameras are among the inputs: give them to the session, "
            "session.chunk(poses=..., query=...), so that frames and steps can be chosen"
        )
    if rewritten or document["preset"] == "exact":
        yield (
            f"compile it: torch.compile(model, backend='light_interaction', "
            f"mode={document['preset']!r}), call it in a lipass.Session, and read "
            "lipass.report().table(); `lipass bisect` compares it with the model"
        )


def _unknown(site: dict[str, Any]) -> bool:
    """Whether a site may be over latents, though no graph shows it."""
    return site["role"] == "other" or "sparse.token_grid" in site["reason"]


def _kept(over: list[dict[str, Any]]) -> Iterator[str]:
    kept = [site for site in over if site["action"] == "kept"]
    if not kept:
        return
    reason, count = Counter(site["reason"] for site in kept).most_common(1)[0]
    remedy = next((text for words, text in _REMEDIES if words in reason), "")
    named = kept[[site["reason"] for site in kept].index(reason)]["name"]
    yield f"{count} sites are kept ({reason}): " + (
        remedy or f"`lipass explain TARGET {named!r}` says what each pass looked at"
    )


_REMEDIES = (
    ("gradient", "call the model under torch.no_grad()"),
    ("name the pieces", "name what its keys are joined of, see find-attention.segments"),
    ("grid", "say the grid with -o sparse.token_grid=Y,X where it cannot be inferred"),
    ("mask", "leave masks of padding out, or write them as a bias of keys"),
    ("no pass of the pipeline", "take a preset that rewrites attention, such as --preset all"),
    ("dense_layers", "sparse.dense_layers asks for it"),
)
