"""Build the pipeline of a preset from what passes declare, those of other packages included."""

from __future__ import annotations

from collections.abc import Set

from lipass.passes import PIPELINES, registered
from lipass.passes.core import Pass, pass_class


def names_in(preset: str, sections: Set[str]) -> str:
    """Return the text of the pipeline that runs with a preset and these sections on.

    A registered pass that declares the preset stands as early as what it requires lets it.

    Raises:
        ValueError: for a registered pass that joins a preset and requires what is not in it.
    """
    order = [
        kind for name in PIPELINES["all"].split(",") if _on(kind := pass_class(name), sections)
    ]
    own = [pass_class(name) for name in sorted(registered())]
    waiting = [kind for kind in own if preset in kind.presets and _on(kind, sections)]
    while waiting:
        present = {kind.name for kind in order}
        ready = [kind for kind in waiting if present.issuperset(kind.requires)]
        if not ready:
            kind = waiting[0]
            raise ValueError(
                f"a pass that joins a preset must find there what it requires, got {kind.name!r}, "
                f"which requires {', '.join(kind.requires)}, in preset {preset!r}; take the "
                "preset out of its `presets`, or register what it requires for the preset too"
            )
        for kind in ready:
            places = [i for i, one in enumerate(order) if one.name in kind.requires]
            order.insert(max(places, default=-1) + 1, kind)
            waiting.remove(kind)
    return ",".join(kind.name for kind in order)


def _on(kind: type[Pass], sections: Set[str]) -> bool:
    return kind.section is None or kind.section in sections
