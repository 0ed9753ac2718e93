"""`lipass.adopt`: make the attention of a model visible to `torch.compile`, reversibly."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from lipass.adapters.adoption import Adoption
from lipass.adapters.attention_calls import show_attention
from lipass.adapters.families import Family, all_families, family_of
from lipass.adapters.rotary_tables import compute_tables
from lipass.adapters.size_tensors import keep_sizes


def adopt(model: Any, *, family: str | None = None) -> Adoption:
    """Bind anew what a model or pipeline keeps from `torch.compile`, and list each change.

    Attention behind `torch.compiler.disable` is uncovered, flash attention and its kin become
    calls of torch that passes know, in whichever modules of the model's package they are bound by
    name. Sizes of a token grid stay ints where modules make tensors of them and read these back,
    and rotary tables are computed where the length of a kept one is read back.
    What else a family of models needs, its adapter adds. Call it before `torch.compile`. The names
    belong to modules, so other models of the same code are adopted with it.

    Args:
        model: a `torch.nn.Module`, or a pipeline that has some as attributes.
        family: name of an adapter where the class of the model does not say it; `"any"` applies
            none.

    Returns:
        What was done; `undo()` reverses it bit for bit, and it is a context manager that does.

    Raises:
        TypeError: if `model` neither is nor holds a module.
        ValueError: if there is no such family.
    """
    found = _modules_of(model)
    adapter = _named(family) if family else _first_family(found)
    members = _members(found, adapter) or found if adapter else []
    # what holds the model holds the loop that it is rolled out by
    itself = getattr(model, "_orig_mod", model)
    is_held = all(one is not itself for one in members)
    drive = adapter.drive if adapter and is_held else None
    adoption = Adoption(
        adapter.name if adapter else "any", drive and functools.partial(drive, model)
    )
    try:
        for module in found:
            show_attention(module, adoption)
            keep_sizes(module, adoption)
            compute_tables(module, adoption)
        for module in members:
            assert adapter is not None
            adapter.adopt(module, adoption)
    except BaseException:
        adoption.undo()
        raise
    return adoption


def _modules_of(model: Any) -> list[nn.Module]:
    plain = getattr(model, "_orig_mod", model)
    if isinstance(plain, nn.Module):
        return [plain]
    found = [one for one in getattr(plain, "__dict__", {}).values() if isinstance(one, nn.Module)]
    if not found:
        raise TypeError(
            f"model must be a torch.nn.Module or hold one as an attribute, got "
            f"{type(model).__name__}; pass the transformer itself"
        )
    return found


def _named(name: str) -> Family | None:
    if name == "any":
        return None
    families = {one.name: one for one in all_families()}
    if name not in families:
        known = ", ".join(["any", *families])
        raise ValueError(
            f"family must be one of {known}, got {name!r}; leave it out to look it up"
        )
    return families[name]


def _first_family(found: list[nn.Module]) -> Family | None:
    kinds = {type(part): None for module in found for part in module.modules()}
    return next((one for kind in kinds if (one := family_of(kind))), None)


def _members(found: list[nn.Module], adapter: Family) -> list[nn.Module]:
    """Return the models of a family that are among some modules or inside of them."""
    parts = [part for module in found for part in module.modules()]
    kinds = {kind for kind in map(type, parts) if adapter.has(kind)}
    return [part for part in parts if type(part) in kinds]
